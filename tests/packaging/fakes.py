"""Fakes of the programs that the launch scripts start. Each records how it was called.

A recording is one JSON file per call, with the arguments exactly as they arrived and the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_RECORDER = """#!{python}
import json, os, pathlib, subprocess, sys
calls = pathlib.Path({calls!r})
path = calls / "{{:03d}}-{name}.json".format(len(list(calls.iterdir())))
path.write_text(json.dumps({{"program": {name!r}, "arguments": sys.argv[1:], "environment": dict(os.environ)}}))
{then}
"""
_RUN_THE_COMMAND = """
command = sys.argv[1:]
while command and command[0].startswith("-"):
    command.pop(0)
sys.exit(subprocess.run(command).returncode)
"""
_RUN_LAUNCH_PLAN = """
if sys.argv[1:] and sys.argv[1].endswith("launch_plan.py"):
    if {plan!r}:
        sys.exit(print({plan!r}))
    sys.exit(subprocess.run([{python!r}, *sys.argv[1:]], env={{**os.environ, "PYTHONPATH": {pythonpath!r}}}).returncode)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of a fake program."""

    program: str
    arguments: list[str]
    environment: dict[str, str]

    def value(self, flag: str) -> str:
        """The argument after a flag."""
        return self.arguments[self.arguments.index(flag) + 1]


@dataclass(kw_only=True)
class FakeMachine:
    """A folder of fakes: an environment (`venv`), and the programs of a cluster on PATH (`bin`)."""

    folder: Path
    num_gpus: int = 0
    num_nodes: int = 1
    plan: str = ""
    """Output of launch_plan.py; empty for its real output."""

    def __post_init__(self) -> None:
        for name in ("bin", "venv/bin", "calls", "installed"):
            (self.folder / name).mkdir(parents=True)
        # A torch that is not a CPU build, so that GPUs are counted. launch_plan.py only reads its version.
        torch = self.folder / "installed" / "torch-2.13.0.dist-info"
        torch.mkdir()
        (torch / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
        pythonpath = f"{self.folder / 'installed'}{os.pathsep}{ROOT}"
        self._program(
            "venv/bin/python",
            _RUN_LAUNCH_PLAN.format(python=sys.executable, pythonpath=pythonpath, plan=self.plan),
        )
        self._program("bin/srun", _RUN_THE_COMMAND)
        self._shell("bin/scontrol", f"for ((i = 0; i < {self.num_nodes}; i++)); do echo node-$i; done")
        self._shell(
            "bin/nvidia-smi", f'for ((i = 0; i < {self.num_gpus}; i++)); do echo "GPU $i: fake"; done'
        )

    def run(
        self,
        script: str,
        *arguments: str,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the project's scripts in an otherwise empty environment."""
        environment = {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "HOME": str(self.folder),
            "LIGHTSEQ_VENV": str(self.folder / "venv"),
            "LIGHTSEQ_SETUP": "0",
            **(variables or {}),
        }
        command = ["bash", str(ROOT / script), *arguments]
        return subprocess.run(
            command, cwd=cwd or ROOT, env=environment, capture_output=True, text=True, timeout=60
        )

    def calls(self, program: str) -> list[Call]:
        """The calls of a fake program, in order."""
        recorded = [
            Call(**json.loads(path.read_text())) for path in sorted((self.folder / "calls").iterdir())
        ]
        return [call for call in recorded if call.program == program]

    def launches(self) -> list[Call]:
        """Calls of launch_ranks.py, which is torchrun, without that first argument."""
        launcher = str(ROOT / "scripts" / "launch_ranks.py")
        found = [call for call in self.calls("python") if call.arguments[:1] == [launcher]]
        return [replace(call, arguments=call.arguments[1:]) for call in found]

    def launch(self) -> Call:
        """The only launch."""
        (call,) = self.launches()
        return call

    def _program(self, path: str, then: str = "") -> None:
        name = Path(path).name
        text = _RECORDER.format(python=sys.executable, calls=str(self.folder / "calls"), name=name, then=then)
        self._write(path, text)

    def _shell(self, path: str, command: str) -> None:
        self._write(path, f"#!/bin/bash\n{command}\n")

    def _write(self, path: str, text: str) -> None:
        target = self.folder / path
        target.write_text(text)
        target.chmod(0o755)


def flags_after_module(arguments: Sequence[str]) -> list[str]:
    """What torchrun passes to `pretrain`."""
    return list(arguments[arguments.index("pretrain") + 1 :])
