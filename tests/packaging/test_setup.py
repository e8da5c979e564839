"""Setting up the environment: what pip is told, and what a person is told when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement

from tests.packaging.fakes import ROOT

BASH = shutil.which("bash") or "/bin/bash"


def load(name: str) -> ModuleType:
    """A script as a module."""
    spec = util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


dependencies = load("dependencies")


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if dependencies.distribution_name(line)]
    return {dependencies.distribution_name(pin.name): pin for pin in found}


def test_every_constraint_is_one_exact_version() -> None:
    for pin in pins().values():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert "*" not in specifier.version, pin


def test_the_pins_satisfy_every_requirement_of_the_package() -> None:
    wanted = dependencies.requirements(ROOT / "pyproject.toml", dev=True)
    for requirement in map(Requirement, wanted):
        pin = pins()[dependencies.distribution_name(requirement.name)]
        (specifier,) = pin.specifier
        assert specifier.version in requirement.specifier, f"{pin} does not satisfy {requirement}"


def test_requirements_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    run = dependencies.requirements(ROOT / "pyproject.toml", dev=False)
    assert run == project["build-system"]["requires"] + project["project"]["dependencies"]
    dev = dependencies.requirements(ROOT / "pyproject.toml", dev=True)
    assert dev == run + project["project"]["optional-dependencies"]["dev"]


def test_an_image_keeps_the_torch_it_brings() -> None:
    installed = {
        "torch": "2.12.0a0+0291f960b6.nv26.5",
        "transformer-engine": "2.14",
        "apex": "0.1",
        "numpy": "1.26.4",
        "rich": "13.0.0",
    }
    ours = "# pins\ntorch==2.13.0\nnumpy==2.4.6\nrich==15.0.0\npsutil==7.2.2\nPyYAML==6.0.3\n"
    assert dependencies.constraints(ours, installed, image_constraints="pyyaml==6.0.1\n") == [
        "apex==0.1",
        "torch==2.12.0a0+0291f960b6.nv26.5",
        "transformer-engine==2.14",
        "psutil==7.2.2",
    ]


def pip_commands(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return [
        line.strip()
        for line in joined.splitlines()
        if "pip install" in line and not line.lstrip().startswith("#")
    ]


def test_no_script_installs_an_unpinned_torch() -> None:
    files = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / "Dockerfile", ROOT / ".ci" / "run"]
    commands = [command for file in files for command in pip_commands(file.read_text())]
    assert commands
    for command in commands:
        assert "--no-deps" in command or "-c " in command, command
        # A build in isolation would fetch a torch of its own.
        assert "--editable" not in command or "--no-build-isolation" in command, command


def setup(folder: Path, programs: Mapping[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup_env.sh with nothing on PATH but a few tools and the programs given."""
    tools = folder / "tools"
    tools.mkdir(parents=True)
    for name in (
        "bash",
        "dirname",
        "cat",
        "ls",
        "mktemp",
        "mkdir",
        "tail",
        "find",
        "sort",
        "xargs",
        "env",
        "grep",
        "flock",
    ):
        found = shutil.which(name)
        assert found is not None, name
        (tools / name).symlink_to(found)
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        "PATH": str(tools),
        "HOME": str(folder),
        "LIGHTSEQ_VENV": str(folder / "venv"),
        **variables,
    }
    script = os.path.relpath(ROOT / "scripts" / "setup_env.sh", folder)  # from elsewhere, and relative
    return subprocess.run(
        [BASH, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


OLD_PYTHON = "#!/bin/bash\nexit 1\n"
PYTHON_WITHOUT_VENV = (
    "#!/bin/bash\n[ \"$1\" = -m ] && { echo 'ensurepip is not available'; exit 1; }\necho Python 3.11.9\n"
)


def test_no_python(tmp_path: Path) -> None:
    done = setup(tmp_path, {"python3": OLD_PYTHON})
    assert done.returncode == 1
    assert "no Python 3.11 or newer was found on PATH" in done.stderr
    assert "apt-get install python3" in done.stderr


def test_a_python_of_the_users_that_is_too_old(tmp_path: Path) -> None:
    done = setup(tmp_path, {"python3.9": OLD_PYTHON}, PYTHON="python3.9")
    assert done.returncode == 1
    assert "PYTHON=python3.9 is not a working Python 3.11 or newer" in done.stderr
    assert "unset it" in done.stderr


def test_a_python_without_venv(tmp_path: Path) -> None:
    done = setup(tmp_path, {"python3": PYTHON_WITHOUT_VENV})
    assert done.returncode == 1
    assert "ensurepip is not available" in done.stderr
    assert "failed after" in done.stderr
    assert "apt-get install python3-venv" in done.stderr


def test_a_folder_that_is_no_environment_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    precious = tmp_path / "venv" / "thesis.tex"
    precious.touch()
    done = setup(tmp_path, {"python3": PYTHON_WITHOUT_VENV})
    assert done.returncode == 1
    assert "is no virtual environment" in done.stderr
    assert precious.exists()


def working_environment(folder: Path) -> dict[str, str]:
    """An environment whose Python has every dependency, by its stamp; it records what pip is asked for."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    headers = folder / "headers"
    headers.mkdir()
    (folder / "venv" / "pyvenv.cfg").touch()
    python.write_text(
        "#!/bin/bash\n"
        'case "$*" in\n'
        f'  *sysconfig*) echo "{headers}" ;;\n'
        "  *hashlib*) grep '^/.* MLS_CUDA=1$' >/dev/null && echo other || echo same ;;\n"
        f'  *"-m pip"*) echo "MLS_CUDA=$MLS_CUDA $*" >>"{folder}/pip" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    (folder / "venv" / "lightseq").mkdir()
    (folder / "venv" / "lightseq" / "dependencies").write_text("same\n")
    return {"c++": "#!/bin/bash\n"}


def test_no_compiler(tmp_path: Path) -> None:
    working_environment(tmp_path)
    done = setup(tmp_path, {})
    assert done.returncode == 1
    assert "no C++ compiler (c++) was found on PATH" in done.stderr
    assert "apt-get install g++" in done.stderr


def test_no_python_headers(tmp_path: Path) -> None:
    done = setup(tmp_path, working_environment(tmp_path))
    assert done.returncode == 1
    assert "Python.h" in done.stderr
    assert "apt-get install python3-dev" in done.stderr


def test_each_phase_runs_once(tmp_path: Path) -> None:
    programs = working_environment(tmp_path)
    (tmp_path / "headers" / "Python.h").touch()
    first = setup(tmp_path, programs)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1].startswith("[lightseq] extension: done in ")
    assert "dependencies" not in first.stdout
    built = (tmp_path / "pip").read_text()
    assert "--no-build-isolation --no-deps --editable ." in built
    assert built.startswith("MLS_CUDA=0 ")  # the stand-in says that its torch is a CPU build
    shutil.rmtree(tmp_path / "tools")
    second = setup(tmp_path, programs)
    assert (second.returncode, second.stdout) == (0, "")
    assert (tmp_path / "pip").read_text() == built
    shutil.rmtree(tmp_path / "tools")
    assert setup(tmp_path, programs, MLS_CUDA="1").returncode == 0
    assert (tmp_path / "pip").read_text().removeprefix(built).startswith("MLS_CUDA=1 ")


def test_an_unknown_argument_is_refused() -> None:
    command = [BASH, str(ROOT / "scripts" / "setup_env.sh"), "--devel"]
    done = subprocess.run(
        command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "unknown argument: --devel" in done.stderr
