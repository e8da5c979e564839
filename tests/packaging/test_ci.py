"""The GitHub workflow: it runs what the documents claim, with the commands of this repository.

Nothing is run on GitHub here. `zizmor` and, where it is on PATH, `actionlint` check the file in scripts/lint.sh.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from tests.packaging.fakes import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def jobs() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    return loaded


def rows(job: str) -> list[dict[str, Any]]:
    return list(jobs()[job]["strategy"]["matrix"]["include"])


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def claimed_checkouts() -> set[str]:
    return set(
        re.findall(r"^\| `(core_v[\d.]+)` \|", (ROOT / "docs" / "megatron-lm.md").read_text(), re.MULTILINE)
    )


def test_every_checkout_that_the_documents_claim_is_run() -> None:
    assert claimed_checkouts()
    assert {row["checkout"] for row in rows("megatron-lm")} == claimed_checkouts()


def test_every_python_and_core_is_run() -> None:
    required = {(row["python"], row["core"]) for row in rows("everything") if not row["informational"]}
    pinned = re.search(r"^megatron-core==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert required == {(python, pinned[1]) for python in ("3.11", "3.12", "3.13")}
    assert {f"core_v{row['core']}" for row in rows("everything")} == claimed_checkouts()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (
        project["requires-python"] == f">={min((row['python'] for row in rows('everything')), key=release)}"
    )


@pytest.mark.parametrize("job", ["everything", "megatron-lm"])
def test_new_cores_get_the_python_that_they_need(job: str) -> None:
    for row in rows(job):
        core = row.get("core") or row["checkout"].removeprefix("core_v")
        assert release(core) < (0, 17) or release(row["python"]) >= (3, 12), row


@pytest.mark.parametrize("job", ["everything", "megatron-lm"])
def test_every_row_has_every_value_that_its_job_uses(job: str) -> None:
    used = set(re.findall(r"matrix\.(\w+)", str(jobs()[job])))
    assert used
    for row in rows(job):
        assert set(row) == used


def test_jobs_run_commands_of_this_repository() -> None:
    commands = [step["run"] for job in jobs().values() for step in job["steps"] if "run" in step]
    scripts = [match for command in commands for match in re.findall(r"bash (\S+)", command)]
    assert scripts == [".ci/run", "scripts/run_tests.sh"]
    tests = re.findall(r"tests/\S+", " ".join(commands))
    assert [path for path in [*scripts, *tests] if not (ROOT / path).is_file()] == []


def test_actions_are_pinned_by_commit() -> None:
    uses = [step["uses"] for job in jobs().values() for step in job["steps"] if "uses" in step]
    assert uses
    assert [action for action in uses if not re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action)] == []


def test_it_says_what_was_not_run() -> None:
    assert "No hosted run has happened yet." in WORKFLOW.read_text()
    assert "no hosted run" in (ROOT / "CONTRIBUTING.md").read_text().lower()
