"""tests/cuda/apart.py: it runs every test, and reports groups that fail, break, hang or die."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cuda import apart
from tests.cuda.apart import Verdict, collect, group_of, judge, report, run_group

TESTS = [f"tests/a.py::test_a[{i}-d64x64]" for i in range(3)]
A_FILE = """
import os, time
import pytest
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("case", [1, 2])
def test_sums(case, size):
    assert (case, size) != (2, "large"), "element 7 is wrong"

def test_hangs():
    time.sleep(600)

def test_dies():
    os._exit(11)

def test_breaks():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.skip(reason="no Hopper")
def test_absent():
    pass
"""


@pytest.mark.parametrize(
    ("test", "group"),
    [
        ("tests/a.py::test_a[100x77_none-torch.bfloat16-d64x64]", "test_a d64x64"),
        ("tests/a.py::test_a[64]", "test_a 64"),
        ("tests/a.py::test_a", "test_a"),
    ],
)
def test_groups_are_functions_and_last_parameters(test: str, group: str) -> None:
    assert group_of(test) == group


def test_a_stopped_group_names_the_test_that_ran() -> None:
    output = f"{TESTS[0]} PASSED  [ 33%]\n{TESTS[1]} "
    verdict = judge("a", TESTS, output, None, 9.0)
    assert str(verdict) == f"a: 1 passed: STOPPED after 9 s in {TESTS[1]}"
    ended = judge("a", TESTS[:1], f"{TESTS[0]} SKIPPED [100%]\n", None, 9.0)
    assert str(ended) == f"a: 1 skipped: STOPPED after 9 s in what follows {TESTS[0]}"
    assert "STOPPED after 9 s in its start" in str(judge("a", TESTS, "importing", None, 9.0))


def test_every_kind_of_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "ROOT", tmp_path)
    monkeypatch.setattr(apart, "GROUP_SECONDS", 250.0)
    (tmp_path / "test_things.py").write_text(A_FILE)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\nmarkers = gpu\n")
    groups = collect("test_things.py")
    assert list(groups) == [
        "test_sums small",
        "test_sums large",
        "test_hangs",
        "test_dies",
        "test_breaks",
        "test_absent",
    ]
    assert sum(map(len, groups.values())) == 8
    del groups["test_hangs"]
    end = time.monotonic() + 250
    verdicts = {group: run_group(group, tests, end, 1) for group, tests in groups.items()}
    assert str(verdicts["test_sums small"]) == "test_sums small: 2 passed"
    large = str(verdicts["test_sums large"])
    assert large.startswith(
        "test_sums large: 1 failed, 1 passed: FAILED, the first: test_things.py::test_sums[2-large]"
    )
    assert "element 7 is wrong" in large
    assert "DIED with status 11 in test_things.py::test_dies" in str(verdicts["test_dies"])
    assert str(verdicts["test_breaks"]) == (
        "test_breaks: 1 failed: BROKE in test_things.py::test_breaks - "
        "RuntimeError: CUDA error: an illegal memory access was encountered"
    )
    assert str(verdicts["test_absent"]) == "test_absent: 1 skipped"


def test_a_group_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "ROOT", tmp_path)
    (tmp_path / "test_things.py").write_text(A_FILE)
    verdict = run_group("hang", ["test_things.py::test_hangs"], time.monotonic() + 2, 1)
    assert verdict.trouble.startswith("STOPPED after ")
    assert run_group("late", ["test_things.py::test_hangs"], time.monotonic(), 1).trouble.startswith(
        "NOT STARTED"
    )


def test_a_file_that_cannot_be_collected_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "ROOT", tmp_path)
    (tmp_path / "test_things.py").write_text("import nothing_of_this_name")
    with pytest.raises(RuntimeError, match="nothing_of_this_name"):
        collect("test_things.py")


def test_the_report_ends_with_troubles_and_a_sum() -> None:
    lines: list[str] = []
    good = Verdict(group="good", counts=apart.Counter(passed=3, skipped=1))
    bad = Verdict(
        group="bad", counts=apart.Counter(passed=1, failed=2), trouble="FAILED, the first: x", output="words"
    )
    assert report([bad, good], lines.append) == 1
    assert lines == [
        "----- bad\nwords\n",
        "good: 3 passed, 1 skipped",
        "bad: 2 failed, 1 passed: FAILED, the first: x",
        "2 failed, 4 passed, 1 skipped",
    ]
    assert report([good], lines.append) == 0
