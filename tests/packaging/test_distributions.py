"""The contents of the sdist and the wheel, built without a network and without isolation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from tests.packaging.fakes import ROOT

BUILT_FROM = (
    "csrc",
    "megatron_lightseq",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def build(kind: str, source: Path, target: Path) -> Path:
    """Call the build backend, as pip does with --no-build-isolation; without CUDA, because nvcc takes minutes."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(target)],
        cwd=source, env={**os.environ, "MLS_CUDA": "0"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, as someone who builds from it gets it."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    with tarfile.open(build("sdist", source, folder)) as archive:
        archive.extractall(folder / "unpacked")  # trusted: needs no filter, which Python 3.11.2 lacks
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def files_below(folder: Path, *suffixes: str) -> set[str]:
    return {
        str(path.relative_to(folder))
        for suffix in suffixes
        for path in folder.rglob(f"*{suffix}")
        if "egg-info" not in str(path) and "__pycache__" not in str(path)
    }


def test_the_sdist_has_everything_that_building_needs(sdist: Path) -> None:
    assert files_below(sdist / "csrc", "") >= files_below(ROOT / "csrc", ".cpp", ".h", ".cu", ".cuh")
    assert files_below(sdist / "megatron_lightseq", ".py") == files_below(ROOT / "megatron_lightseq", ".py")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "megatron_lightseq/py.typed"):
        assert (sdist / name).is_file(), name


@pytest.mark.timeout(900)  # it compiles everything once more
def test_the_wheel_holds_the_package_and_nothing_else(sdist: Path, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    wheel = build("wheel", sdist, tmp_path)
    # One wheel per Python version: pybind11 has no stable ABI.
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
        entries = archive.read(next(name for name in names if name.endswith("/entry_points.txt"))).decode()
    tops = {PurePosixPath(name).parts[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"megatron_lightseq"}
    package = {
        name.removeprefix("megatron_lightseq/") for name in names if name.startswith("megatron_lightseq/")
    }
    assert package == files_below(ROOT / "megatron_lightseq", ".py") | {
        "py.typed",
        "_C.abi3.so",
        f"_plan{sysconfig.get_config_var('EXT_SUFFIX')}",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "lightseq = megatron_lightseq.__main__:main" in entries
