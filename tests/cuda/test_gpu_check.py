"""scripts/gpu_check.sh without a GPU: order, time limits and results of its stages, and the commands they start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda.emulator import Emulator
from tests.cuda.sanitized import run_tiles

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
LIMITS = dict(re.findall(r"([a-z-]+):(\d+)", re.search(r"^STAGES=\((.*)\)", SCRIPT.read_text(), re.M)[1]))  # type: ignore[index]
TOTAL = int(re.search(r"^TOTAL=(\d+)", SCRIPT.read_text(), re.M)[1])  # type: ignore[index]
PYTHON = """#!/usr/bin/env bash
# Simulates the commands of a machine with a GPU. Stages log their arguments, and fail or skip as FAIL and SKIP say.
case "$*" in
    *is_available*) [ -z "${NO_GPU:-}" ] && echo "Some GPU"; exit ;;
    *missing_cuda*) echo "${MISSING:-}" && exit ;;
    *"import numpy, pytest"*) [ -z "${NO_PYTEST:-}" ]; exit ;;
    "-c import"*) exit ;;
esac
echo "$*" >>"$LOG"
[[ -z ${FAIL:-} || "$*" != *"$FAIL"* ]] || { echo "it broke" && exit 3; }
[[ -z ${HANG:-} || "$*" != *"$HANG"* ]] || sleep 60
[[ -z ${SKIP:-} || "$*" != *"$SKIP"* ]] || { echo "4 skipped, 2 deselected in 0.10s" && exit; }
[[ "$*" != *"bench.gpu --out"* ]] || echo figures >"$4/gpu.md"
echo "4 passed, 2 deselected in 0.10s"
"""
SANITIZER = (
    '#!/usr/bin/env bash\n[ "$1" = --tool ] && [ "$3 $4" = "--error-exitcode 9" ] && shift 4 && exec "$@"\n'
)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of programs that simulate those of a machine with a GPU."""
    for name, text in (("python", PYTHON), ("nvcc", "#!/bin/sh\n"), ("compute-sanitizer", SANITIZER)):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def check(
    machine: Path, *arguments: str, script: Path = SCRIPT, **variables: str
) -> tuple[int, str, list[str]]:
    """The exit status, the output, and the commands that the stages started."""
    log = machine / "log"
    log.write_text("")
    path = f"{machine}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHON": str(machine / "python"),
        "LOG": str(log),
        **variables,
    }
    done = subprocess.run(
        ["bash", str(script), *arguments, str(machine / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()


def test_all_stages_run_in_order_and_within_nine_minutes(machine: Path) -> None:
    status, output, started = check(machine, GPU_CHECK_COMMIT="abcdef")
    assert status == 0, output
    assert TOTAL <= 540
    assert all(5 < int(limit) < TOTAL for limit in LIMITS.values())
    words = (
        "build_ext",
        "test_calibration",
        "test_gpu",
        "test_two_ranks",
        "sanitized",
        "bench.gpu",
        "sanitized",
    )
    for line, word in zip(started, (*words, "100x77"), strict=True):
        assert word in line
    assert all("tests.cuda.apart --seconds" in line for line in started[1:3])
    bench = started[5]
    assert f"--seconds {int(LIMITS['bench']) - 40} " in bench
    assert "--commit abcdef --checks build=ok primitives=ok correctness=ok ranks=ok memcheck=ok" in bench
    assert re.findall(r"^\s+([a-z-]+)=ok$", output, re.M) == list(LIMITS)
    assert sorted(path.name for path in (machine / "out").iterdir()) == ["gpu.md", "log.txt"]
    assert (machine / "out" / "gpu.md").read_text().endswith("- racecheck=ok\n- later-gpus=ok\n")
    assert "Some-GPU, commit abcdef" in output


@pytest.mark.parametrize(
    ("trouble", "verdict"),
    [
        ({"FAIL": "test_calibration"}, "primitives=FAILED: exit status 3"),
        ({"SKIP": "test_calibration"}, "primitives=FAILED: nothing ran"),
    ],
)
def test_a_stage_that_fails_is_told_and_the_others_run(
    machine: Path, trouble: dict[str, str], verdict: str
) -> None:
    status, output, started = check(machine, **trouble)
    assert status == 1
    assert len(started) == len(LIMITS)
    assert verdict in output
    assert verdict in started[5]
    assert output.count("=ok") == len(LIMITS) - 1
    assert "some stages failed" in output


def changed_script(machine: Path, *changes: tuple[str, str]) -> Path:
    text = SCRIPT.read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    copy = machine / "scripts" / "gpu_check.sh"
    copy.parent.mkdir()
    copy.write_text(text)
    return copy


def test_a_stage_that_hangs_is_stopped(machine: Path) -> None:
    copy = changed_script(machine, ("primitives:60", "primitives:1"), ("LEAST=5", "LEAST=1"))
    log = machine / "log"
    environment = {
        "PATH": f"{machine}:{os.environ['PATH']}",
        "PYTHON": str(machine / "python"),
        "LOG": str(log),
    }
    done = subprocess.run(
        ["bash", str(copy), "--only", "primitives,ranks", "out"],
        env={**environment, "HANG": "test_calibration"},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 1
    assert "primitives=FAILED: timed out after 1 s" in done.stdout
    assert "ranks=ok" in done.stdout


def test_a_stage_without_time_is_not_started(machine: Path) -> None:
    script = changed_script(machine, (f"TOTAL={TOTAL}", "TOTAL=4"))
    status, output, started = check(machine, script=script)
    assert (status, started) == (1, [])
    assert output.count("=FAILED: not started, total time limit reached") == len(LIMITS)


def test_what_is_missing_or_too_new_is_told_first(machine: Path) -> None:
    status, output, started = check(machine, NO_PYTEST="1")
    assert (status, started) == (1, [])
    assert "has no module of the name above. Install it next to torch" in output
    for tool, words in (
        ("nvcc", "Cuda compilation tools, release 13.0"),
        ("nvidia-smi", "CUDA Version: 12.4 |"),
    ):
        (machine / tool).write_text(f"#!/bin/sh\necho '{words}'\n")
        (machine / tool).chmod(0o755)
    status, output, started = check(machine, CUDA_HOME=str(machine / "nowhere"))
    assert (status, len(started)) == (0, len(LIMITS))
    assert "warning: nvcc is from CUDA 13, the driver from CUDA 12" in output
    assert "CUDA Version: 12.4" in (machine / "out" / "log.txt").read_text()


def test_only_runs_what_it_names(machine: Path) -> None:
    status, output, started = check(machine, "--only", "ranks,bench")
    assert status == 0, output
    assert len(started) == 2
    status, output, started = check(machine, "--only", "ranks,benches")
    assert (status, started) == (1, [])
    assert "unknown stage benches. The stages are: build primitives correctness" in output


def test_without_tools_stages_are_skipped_by_name(machine: Path) -> None:
    (machine / "compute-sanitizer").unlink()
    (machine / "nvcc").unlink()
    status, output, started = check(
        machine, PATH=f"{machine}:/usr/bin:/bin", CUDA_HOME=str(machine / "nowhere")
    )
    assert status == 0
    assert len(started) == len(LIMITS) - 3
    assert "build=skipped: nvcc is not installed; checking the existing extension" in output
    assert output.count("=skipped: compute-sanitizer is not installed") == 2


def test_nothing_is_checked_without_a_gpu_or_kernels(machine: Path) -> None:
    status, output, started = check(machine, NO_GPU="1")
    assert (status, started) == (1, [])
    assert "finds no GPU" in output
    status, output, started = check(machine, MISSING="built without CUDA")
    assert (status, len(started)) == (1, 1)
    assert "no CUDA kernels to check: built without CUDA" in output


def test_what_the_sanitizer_sees_is_every_kernel(library: Path) -> None:
    for architecture in ("sm80", "sm90"):
        run_tiles(lambda deterministic: Emulator(library, architecture, deterministic=deterministic), "cpu")  # noqa: B023


GPU_STAGES = ("tests/cuda/test_gpu.py", "tests/cuda/test_calibration.py", "tests/cuda/test_two_ranks.py")
ABSENT = [
    "megatron",
    "jsonargparse",
    "tokenizers",
    "rich",
    "tensorboard",
    "yaml",
    "matplotlib",
    "psutil",
    "hypothesis",
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine would run them")
def test_a_bare_machine_with_torch_and_pytest_is_enough() -> None:
    """The stages import torch, numpy and pytest only: no pytest plugins, no other dependencies of the package."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        "import pytest, tests.cuda.apart, tests.cuda.sanitized, megatron_lightseq.tools.bench.gpu\n"
        f"sys.exit(pytest.main(['-q', '-m', 'gpu', '-p', 'no:cacheprovider', *{GPU_STAGES!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ skipped, \d+ deselected", done.stdout, re.M), done.stdout
