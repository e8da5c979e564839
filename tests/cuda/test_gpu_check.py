"""scripts/gpu_check.sh without a GPU: order, time limits and results of its stages, and the commands they start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.cuda.emulator import Emulator
from tests.cuda.sanitized import announced, run_tiles

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
SANITIZER = """#!/usr/bin/env bash
[ -z "${NO_DEVICE:-}" ] || { echo "========= Error: Device not supported" && exit 1; }
[ "$1" = --tool ] && [ "$3 $4" = "--error-exitcode 9" ] || exit 2
tool=$2 && shift 4
[ "${RACES:-}" != "$tool" ] || [ "$2" = -c ] || exit 9
exec "$@"
"""


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
        "sanitized --one-dtype",
        "test_calibration",
        "test_gpu",
        "test_two_ranks",
        "bench.gpu",
        "sanitized",
        "sanitized",
    )
    for line, word in zip(started, (*words, "100x77"), strict=True):
        assert word in line
    assert all("tests.cuda.apart --seconds" in line for line in started[2:4])
    bench = started[5]
    assert f"--seconds {int(LIMITS['bench']) - 40} " in bench
    assert bench.endswith("--commit abcdef --checks build=ok smoke=ok primitives=ok correctness=ok ranks=ok")
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
    assert "unknown stage benches. The stages are: build smoke primitives correctness" in output


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


def test_a_sanitizer_that_refuses_the_gpu_is_skipped_with_its_reason(machine: Path) -> None:
    status, output, started = check(machine, "--only", "memcheck,racecheck", NO_DEVICE="1")
    assert (status, started) == (0, [])
    for name in ("memcheck", "racecheck"):
        why = (
            "compute-sanitizer cannot check a program of one line here: ========= Error: Device not supported"
        )
        assert f"{name}=skipped: {why}" in output


def test_races_are_told_and_do_not_count_but_bad_accesses_do(machine: Path) -> None:
    status, output, _ = check(machine, "--only", "memcheck,racecheck", RACES="racecheck")
    assert status == 0, output
    assert "racecheck=advisory: exit status 9" in output
    status, output, _ = check(machine, "--only", "memcheck,racecheck", RACES="memcheck")
    assert status == 1
    assert "memcheck=FAILED: exit status 9" in output


def test_a_carried_module_is_used_where_nothing_is_built(machine: Path) -> None:
    script = changed_script(machine, ("TOTAL=535", "TOTAL=535"))
    package = machine / "megatron_lightseq"
    package.mkdir()
    carried = machine / "carried.so"
    carried.write_text("kernels")
    # The first question after the build is answered by MISSING, the next ones by a module that is there.
    (machine / "python").write_text(
        PYTHON.replace("*missing_cuda*)", "*missing_cuda*) [ ! -e megatron_lightseq/_C.abi3.so ] || exit 0;")
    )
    options = ("--only", "smoke", "--module", str(carried))
    status, output, started = check(machine, *options, script=script, MISSING="no nvcc")
    assert status == 0, output
    assert len(started) == 1
    assert (package / "_C.abi3.so").read_text() == "kernels"
    assert "no CUDA kernels were built (no nvcc): using " in output
    status, output, _ = check(machine, "--module", "nowhere.so", script=script)
    assert status == 1
    assert "--module nowhere.so: there is no such file" in output


def test_results_are_committed_alone(machine: Path) -> None:
    script = changed_script(machine, ("TOTAL=535", "TOTAL=535"))

    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", *identity, *words], cwd=machine, check=True, capture_output=True, text=True
        )
        return done.stdout

    git("init", "-q")
    git("config", "user.name", "a")
    git("config", "user.email", "a@b")
    (machine / ".gitignore").write_text("out\n")
    git("add", ".gitignore")
    git("commit", "-q", "-m", "first")
    (machine / "unfinished.py").write_text("")
    git("add", "unfinished.py")
    status, output, _ = check(
        machine, "--commit", script=script, FAIL="test_calibration", GPU_CHECK_COMMIT="abcdef"
    )
    assert status == 1
    assert "committed " in output
    assert git("show", "--name-only", "--format=%s").split("\n")[:4] == [
        "Record what gpu_check.sh found on Some-GPU at abcdef",
        "",
        "out/gpu.md",
        "out/log.txt",
    ]


def test_nothing_is_checked_without_a_gpu_or_kernels(machine: Path) -> None:
    status, output, started = check(machine, NO_GPU="1")
    assert (status, started) == (1, [])
    assert "finds no GPU" in output
    status, output, started = check(machine, MISSING="built without CUDA")
    assert (status, len(started)) == (1, 1)
    assert "no CUDA kernels to check: built without CUDA" in output


def test_what_the_sanitizer_sees_is_every_kernel(library: Path) -> None:
    for architecture in ("sm80", "sm90"):
        run_tiles(
            lambda deterministic: Emulator(library, architecture, deterministic=deterministic),  # noqa: B023
            "cpu",
            dtypes=(torch.bfloat16,),
        )


def test_the_last_line_names_the_kernel_that_hangs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with announced("forward, D = 64"):
        assert capsys.readouterr().out == "forward, D = 64 ... "
    assert capsys.readouterr().out == "ran\n"
    with pytest.raises(RuntimeWarning, match="half the speed"), announced("backward"):
        warnings.warn("half the speed", RuntimeWarning, stacklevel=1)


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
