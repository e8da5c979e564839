"""Setting up the environment: the arguments of pip, and the messages when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tests.packaging.fakes import ROOT

BASH = shutil.which("bash") or "/bin/bash"


def load(name: str) -> ModuleType:
    """A script as a module."""
    return load_file(name, ROOT / "scripts" / f"{name}.py")


def load_file(name: str, path: Path) -> ModuleType:
    """A Python file as a module."""
    spec = util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


dependencies = load("dependencies")


def constraints_file() -> list[str]:
    return (ROOT / "constraints.txt").read_text().splitlines()


def pins() -> dict[str, Requirement]:
    found = [Requirement(line) for line in constraints_file() if dependencies.distribution_name(line)]
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
    extras = project["project"]["optional-dependencies"]
    assert dev == run + extras["dev"] + extras["docs"] + extras["hf"]
    only_gpus_use = {dependencies.distribution_name(line) for line in extras["te"] + extras["flash-attn"]}
    assert only_gpus_use == {"transformer-engine", "flash-attn"}
    assert only_gpus_use.isdisjoint(map(dependencies.distribution_name, dev))


def asked_for(version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "dependencies.py"), *arguments]
    environment = {**os.environ, "LIGHTSEQ_MEGATRON_CORE": version}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("version", "added"), [("0.14.0", []), ("0.16.1", []), ("0.18.0", ["triton"])])
def test_another_megatron_core_replaces_the_pinned_one(version: str, added: list[str]) -> None:
    plain = dependencies.requirements(ROOT / "pyproject.toml", dev=True)
    lines = asked_for(version, "requirements", "--dev").stdout.splitlines()
    assert [line for line in lines if line not in plain] == [f"megatron-core=={version}", *added]
    assert len(lines) == len(plain) + len(added)
    pinned = asked_for(version, "constraints").stdout.splitlines()
    changed = [pair for pair in zip(constraints_file(), pinned, strict=True) if len(set(pair)) > 1]
    now, was = f"megatron-core=={version}", str(pins()["megatron-core"])
    assert changed == ([] if now == was else [(was, now)])


@pytest.mark.parametrize("version", ["main", "0.18", ">=0.18", "0.18.0; rm"])
def test_another_megatron_core_is_an_exact_release(version: str) -> None:
    done = asked_for(version, "constraints")
    assert done.returncode == 1
    assert f"LIGHTSEQ_MEGATRON_CORE={version}: a release of megatron-core has three numbers" in done.stderr
    assert done.stdout == ""


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
        # An isolated build would download another torch.
        assert "--editable" not in command or "--no-build-isolation" in command, command


def setup(folder: Path, programs: Mapping[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup_env.sh with only a few tools and the given programs on PATH."""
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
    script = os.path.relpath(ROOT / "scripts" / "setup_env.sh", folder)  # relative, from another folder
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
    assert "is not a virtual environment" in done.stderr
    assert precious.exists()


def working_environment(folder: Path) -> dict[str, str]:
    """An environment whose stamp says that all dependencies are installed; it records the arguments of pip."""
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
    assert built.startswith("MLS_CUDA=0 ")  # the fake torch is a CPU build
    shutil.rmtree(tmp_path / "tools")
    second = setup(tmp_path, programs)
    assert (second.returncode, second.stdout) == (0, "")
    assert (tmp_path / "pip").read_text() == built
    shutil.rmtree(tmp_path / "tools")
    assert setup(tmp_path, programs, MLS_CUDA="1").returncode == 0
    assert (tmp_path / "pip").read_text().removeprefix(built).startswith("MLS_CUDA=1 ")


@pytest.fixture
def build() -> ModuleType:
    """setup.py as a module; nothing is built."""
    return load_file("setup", ROOT / "setup.py")


def test_an_old_setuptools_is_named(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert f"setuptools>={build.OLDEST_SETUPTOOLS}" in project["build-system"]["requires"]
    build.check_setuptools()
    monkeypatch.setattr(build.setuptools, "__version__", "70.3.0")
    with pytest.raises(
        SystemExit, match=r"has setuptools 70\.3\.0, .* pip install --upgrade 'setuptools>=77'"
    ):
        build.main()


def toolkit(root: Path, libraries: str) -> Path:
    """A fake CUDA toolkit, whose nvcc reports its folder like the real one."""
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!{BASH}\necho '#$ TOP={root}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    (root / libraries).mkdir(parents=True)
    (root / libraries / "libcudart_static.a").touch()
    return nvcc


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the CUDA toolkits of this machine; the test adds its own."""
    for name in ("CUDA_HOME", "CUDA_PATH", "MLS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    is_file = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: "usr/local" not in str(path) and is_file(path))
    monkeypatch.setattr(shutil, "which", lambda _: None)


@pytest.mark.usefixtures("without_cuda")
def test_the_toolkit_of_pip_is_found(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.find_nvcc() is None
    nvcc = toolkit(tmp_path / "nvidia" / "cu13", "lib")
    toolkit(tmp_path / "nvidia" / "cu12", "lib")
    monkeypatch.syspath_prepend(tmp_path)
    assert build.find_nvcc() == str(nvcc)
    root = build.cuda_root(str(nvcc))
    assert root == (tmp_path / "nvidia" / "cu13").resolve()
    assert build.cuda_library_dirs(root) == [str(root / "lib")]


@pytest.mark.parametrize("libraries", ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"])
def test_the_toolkit_behind_a_wrapper_script_is_found(
    build: ModuleType, tmp_path: Path, libraries: str
) -> None:
    nvcc = toolkit(tmp_path / "cuda", libraries)
    wrapper = tmp_path / "usr" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f'#!{BASH}\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    root = build.cuda_root(str(wrapper))
    assert build.cuda_library_dirs(root) == [str((tmp_path / "cuda").resolve() / libraries)]


def test_a_toolkit_without_the_runtime_is_named(build: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"libcudart_static\.a is not in .*pip: nvidia-cuda-runtime"):
        build.cuda_library_dirs(tmp_path)


@pytest.mark.usefixtures("without_cuda")
def test_cuda_is_asked_for_where_there_is_none(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "pip_installed_nvcc", list)
    monkeypatch.setenv("MLS_CUDA", "1")
    with pytest.raises(
        SystemExit, match="no nvcc in CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH or Python's"
    ):
        build.find_nvcc()


def test_an_unknown_argument_is_refused() -> None:
    command = [BASH, str(ROOT / "scripts" / "setup_env.sh"), "--devel"]
    done = subprocess.run(
        command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "unknown argument: --devel" in done.stderr
