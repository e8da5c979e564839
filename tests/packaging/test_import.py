"""Importing the package is cheap, loads nothing heavy and prints nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.packaging.fakes import ROOT

HEAVY = (
    "torch",
    "megatron",
    "matplotlib",
    "transformer_engine",
    "numpy",
    "rich",
    "jsonargparse",
    "tensorboard",
)
PROBE = "import json, sys; before = set(sys.modules); {statement}; print(json.dumps(sorted(set(sys.modules) - before)))"


def imported_by(statement: str) -> set[str]:
    """Top-level modules that a statement imports in a new interpreter; it must not print anything else."""
    command = [sys.executable, "-X", "utf8", "-c", PROBE.format(statement=statement)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    return {name.partition(".")[0] for name in json.loads(line)}


@pytest.mark.parametrize(
    "statement",
    [
        "import megatron_lightseq",
        "import megatron_lightseq as mls; mls.schedule.build('lightseq', mls.SequenceLayout.contiguous(8))",
        "import megatron_lightseq.config",
        "import megatron_lightseq.errors",
        "import megatron_lightseq.kernels.specs",
    ],
)
def test_light_imports(statement: str) -> None:
    assert imported_by(statement).isdisjoint(HEAVY)


def test_the_probe_sees_heavy_imports() -> None:
    assert "numpy" in imported_by("import numpy")


def test_attention_needs_no_megatron() -> None:
    loaded = imported_by("from megatron_lightseq import dist_attention")
    assert "torch" in loaded
    assert loaded.isdisjoint({"megatron", "matplotlib", "transformer_engine", "tensorboard"})
