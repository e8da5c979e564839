"""The command line: names, exit statuses, lazy imports, and what the commands print."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lightseq import cli
from megatron_lightseq.cli import COMMANDS, run
from megatron_lightseq.cli.doctor import EXTRAS, REQUIRED, Finding, examine, probed
from megatron_lightseq.errors import CheckpointError, ConfigError
from megatron_lightseq.schedule import Schedule
from megatron_lightseq.schedule.scan import Scan

HEAVY = "{'torch', 'numpy', 'megatron', 'jsonargparse', 'rich', 'matplotlib'}"


def in_new_process(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


# --- names ----------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_imports_none() -> None:
    script = (
        "import sys\nfrom megatron_lightseq.cli import run\n"
        f"assert run(['--help']) == 0\nprint({HEAVY} & set(sys.modules))"
    )
    done = in_new_process(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("set()\n"), done.stdout
    for name, command in COMMANDS.items():
        assert f"{name} " in done.stdout
        assert command.summary in done.stdout


def test_every_command_exists() -> None:
    for name, command in COMMANDS.items():
        assert importlib.util.find_spec(command.module) is not None, name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pretrian", "there is no command 'pretrian'. Perhaps pretrain was meant."),
        ("prepare", "Perhaps prepare-data was meant"),
        ("prepare_dta", "Perhaps prepare-data was meant"),
        ("xyz", f"The commands are {', '.join(COMMANDS)}"),
    ],
)
def test_unknown_command_is_refused(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name]) == 2
    assert text in capsys.readouterr().err


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("megatron-lightseq 0.")
    assert run([]) == 2
    assert "usage: lightseq COMMAND" in capsys.readouterr().out


def test_module_and_console_script_are_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lightseq", "nothing"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no command 'nothing'" in done.stderr


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "status"), [(ConfigError("wrong"), 2), (CheckpointError("broke"), 1)])
def test_errors_become_a_line_and_a_status(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("megatron_lightseq.cli.schedule.run", fail)
    assert run(["schedule"]) == status
    assert capsys.readouterr().err == f"lightseq schedule: {error}\n"


@pytest.mark.parametrize(("local_rank", "waits"), [("0", False), ("1", True)])
def test_first_rank_of_a_host_speaks_first(
    local_rank: str, waits: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert run(["pretrain", "--num-layer", "2"]) == 2
    assert bool(slept) == waits
    assert "Perhaps --num-layers was meant" in capsys.readouterr().err


def test_pretrain_refuses_before_importing_torch() -> None:
    script = (
        "import sys\nfrom megatron_lightseq.cli import run\n"
        "status = run(['pretrain', '--data-path', 'x', '--context-parallel-size', '2'])\n"
        "print(status, 'torch' in sys.modules)"
    )
    done = in_new_process(script, WORLD_SIZE="3")
    assert done.stdout == "2 False\n"
    assert "context_parallel_size 2, world size 3" in done.stderr


def test_pretrain_help_shows_keys_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: lightseq pretrain [CONFIG.yaml ...] [--key value ...]")
    for part in (
        "model:\n  A decoder-only transformer.",
        "--cp-method",
        "--print-config",
        "How attention is",
    ):
        assert part in text


# --- schedule -------------------------------------------------------------------------------------------------------


def test_schedule_prints_what_parses_back_and_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--heads", "8", "--groups", "2", "--head-dim", "16", "--dtype", "fp32"]
    assert run(["schedule", "--method", "lightseq", "--cp", "4", "--seq-length", "64", *shape]) == 0
    text, _, figures = capsys.readouterr().out.partition("\n\n")
    schedule = Schedule.parse(text)
    assert (schedule.method, schedule.layout.cp_size, schedule.seq_length) == ("lightseq", 4, 64)
    assert schedule.fingerprint in figures
    for name in ("makespan", "busy", "sent per rank", "received", "ideal"):
        assert name in figures


def test_schedule_counts_bytes_of_the_ring_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks, 2048 tokens each: rank 0 sends its K and V once, 2048 * 2 * G * D * 2 bytes, and gets nothing."""
    shape = ["--heads", "4", "--groups", "2", "--head-dim", "64"]
    assert run(["schedule", "--method", "ring", "--cp", "2", "--seq-length", "4096", *shape]) == 0
    out = capsys.readouterr().out
    assert f"sent per rank   0.00 MiB to {2048 * 2 * 2 * 64 * 2 / 2**20:.2f} MiB" in out


@pytest.mark.parametrize("method", ["lightseq", "ring", "zigzag"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_schedule_of_every_method(method: str, direction: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schedule", "--method", method, "--direction", direction, "--cp", "3"]) == 0
    assert capsys.readouterr().out.startswith(f"{method} {direction} ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--method", "lightsec"], "method 'lightsec'"),
        (["--layout", "zigzag"], "lightseq works on contiguous shards"),
        (["--cp", "0"], "all are 1 or more"),
        (["--heads", "8", "--groups", "3"], "Set --groups to a divisor of 8"),
        (["--cp", "3", "--seq-length", "100"], "100"),
    ],
)
def test_schedule_refuses(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schedule", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_schedule_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "schedule.png"
    assert run(["schedule", "--cp", "2", "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in capsys.readouterr().out


# --- doctor ---------------------------------------------------------------------------------------------------------


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_doctor_reports_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    found = by_name(examine())
    assert set(REQUIRED) <= set(found)
    assert found["torch"].verdict == "ok"
    assert {"Python", "CPU cores", "GPUs", "compiled kernels", "[te] transformer_engine", "apex"} <= set(
        found
    )
    status = run(["doctor"])
    problems = [finding for finding in found.values() if finding.verdict == "problem"]
    assert status == (1 if problems else 0)
    assert f"{len(problems) or 'no'} problem" in capsys.readouterr().out


def test_doctor_prints_no_environment_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    run(["doctor"])
    assert "very-secret-value" not in capsys.readouterr().out


BROKEN = {
    "import error": "raise ImportError('undefined symbol: _ZN2at4_ops')",
    "runtime error": "raise RuntimeError('needs CUDA')",
    "os error": "raise OSError('libcudart.so.12: cannot open shared object file')",
    "assertion": "assert False, 'no device'",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("what", ["[te] transformer_engine", "[flash-attn] flash_attn", "apex"])
def test_doctor_survives_broken_extensions(
    what: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{what.split()[-1]}.py").write_text(BROKEN[name])
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = by_name(examine())[what]
    assert finding.verdict == "absent"
    assert finding.found.startswith("installed, but importing it fails: ")
    assert finding.remedy.startswith("treated as absent")


def test_doctor_sees_working_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module(
        "megatron_lightseq.megatron.spec"
    )  # Megatron looks for apex once: before the stand-in
    (tmp_path / "apex.py").write_text("__version__ = '9.9'")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert by_name(examine())["apex"] == Finding(what="apex", verdict="ok", found="9.9")
    monkeypatch.delitem(sys.modules, "apex")


def test_doctor_says_what_every_extra_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    for name, requirements in project["optional-dependencies"].items():
        declared = " ".join(requirements)
        assert all(package in declared for package in EXTRAS[name].packages), name
    found = by_name(examine())
    assert found["[flash-attn] flash_attn"] == Finding(
        what="[flash-attn] flash_attn",
        verdict="absent",
        found="not installed",
        remedy="`pip install -e '.[flash-attn]'` adds `--cp-kernel flash_attn` on GPUs",
    )
    assert found["[dev]"].verdict == "ok"
    assert f"pytest {pytest.__version__}" in found["[dev]"].found
    monkeypatch.setitem(EXTRAS, "dev", replace(EXTRAS["dev"], packages=("pytest", "no-such-package")))
    missing = by_name(examine())["[dev]"]
    assert missing.verdict == "absent"
    assert missing.found.endswith("no-such-package not installed")
    assert missing.remedy.endswith("'.[dev]'` adds tests and linters")


def test_doctor_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import metadata

    real = metadata.version

    def version(name: str) -> str:
        if name == "psutil":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(
        "megatron_lightseq.kernels.extension.missing_extension",
        lambda: "the compiled kernels have not been built",
    )
    assert run(["doctor"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "2 problems" in text
    found = by_name(examine())
    assert found["psutil"].found == "not installed"
    assert "pip install" in found["psutil"].remedy
    assert "reference kernel" in found["compiled kernels"].remedy


def test_a_probe_that_raises_becomes_a_problem() -> None:
    def _gpus() -> Finding:
        raise RuntimeError("driver too old")

    finding = probed(_gpus)
    assert (finding.what, finding.verdict, finding.found) == (
        "gpus",
        "problem",
        "RuntimeError: driver too old",
    )


def test_scans_are_printed_ranked_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scan.png"
    shape = ["--cp", "4", "--heads", "2", "--head-dim", "128", "--transition", "number"]
    assert run(["schedule", "--scan", "ring", *shape, "--png", str(path)]) == 0
    text, figures = capsys.readouterr().out.split("\n\n")
    scan = Scan.parse(text)
    assert (scan.method, len(scan.steps)) == ("ring", 5)
    assert scan.fingerprint in figures
    assert "0.00 to 0.12 MiB, 0.38 MiB in total" in figures  # three states of 2 x 128 x 128 fp32 numbers
    assert path.read_bytes().startswith(b"\x89PNG")
    assert run(["schedule", "--scan", "auto", "--cp", "16"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["two_level", "ring"]
