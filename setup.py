"""Builds megatron_lightseq._C (the CPU kernel always, the CUDA kernel where nvcc is found) and megatron_lightseq._plan.

Supported build machines: a C++ compiler only; nvcc without a GPU; nvcc and a GPU. CUDA sources are compiled by
calling nvcc directly, because torch's CUDAExtension does not work with a CPU-only torch.

Environment:
    MLS_CUDA        auto (default) | 0 (never) | 1 (fail without nvcc)
    MLS_CUDA_ARCHS  compute capabilities, default "80+PTX;90a". 80: native code that also runs on 8.6 and 8.9;
                    +PTX: code that drivers compile for GPUs later than 9.0; 90a: native code for Hopper only
    MAX_JOBS        parallel compilations, default: one per core
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, LinkError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OLDEST_SETUPTOOLS = 77  # the first that reads the license fields of pyproject.toml (PEP 639)
# The oldest torch whose stable ABI we use: 2.11.0.
TORCH_TARGET_VERSION = "0x020b000000000000"
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # setuptools passes -g; debug information would be most of the file
    "-Wall",
    "-Wno-psabi",  # vectors wider than the default target are passed only between inlined functions
    "-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    "-DPy_LIMITED_API=0x030b0000",
]
# Without contraction, so that C++ rounds as Python does and both make the same plans.
PLAN_FLAGS = ["-std=c++20", "-O3", "-g0", "-Wall", "-fvisibility=hidden", "-ffp-contract=off"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC"]
CUDA_RUNTIME = "libcudart_static.a"


def check_setuptools() -> None:
    """Exit with the remedy where setuptools is too old; it would fail later, in words that name a license."""
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        sys.exit(
            f"megatron_lightseq: this environment has setuptools {setuptools.__version__}, and building needs "
            f"{OLDEST_SETUPTOOLS} or later. Run: python -m pip install --upgrade 'setuptools>={OLDEST_SETUPTOOLS}'"
        )


def source_hash() -> str:
    """Of csrc, by the package's own function; the package cannot be imported before it is built."""
    functions = runpy.run_path(str(ROOT / "megatron_lightseq" / "kernels" / "source_hash.py"))
    return str(functions["source_hash"](CSRC))


def max_jobs() -> int:
    """How many compilations may run in parallel."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def relative(paths: list[Path]) -> list[str]:
    """Paths relative to the repository, sorted."""
    return [str(path.relative_to(ROOT)) for path in sorted(paths)]


def find_nvcc() -> str | None:
    """The CUDA compiler, or None if there is none or MLS_CUDA=0."""
    choice = os.environ.get("MLS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"MLS_CUDA={choice}: it must be auto, 0 or 1.")
    if choice == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    for path in [*candidates, shutil.which("nvcc") or "", *pip_installed_nvcc()]:
        if os.path.isfile(path):
            return path
    if choice == "1":
        sys.exit(
            "MLS_CUDA=1: no nvcc in CUDA_HOME, CUDA_PATH, /usr/local/cuda, PATH or Python's packages. Install the CUDA "
            "toolkit, or unset MLS_CUDA. From PyPI: pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt "
            "nvidia-cuda-cccl nvidia-nvvm."
        )
    return None


def pip_installed_nvcc() -> list[str]:
    """nvcc of pip's nvidia-cuda-nvcc, e.g. site-packages/nvidia/cu13/bin/nvcc; the newest first."""
    namespace = importlib.util.find_spec("nvidia")
    folders = [] if namespace is None else namespace.submodule_search_locations or []
    found = [str(path) for folder in folders for path in Path(folder).glob("*/bin/nvcc")]
    return sorted(found, reverse=True)


def cuda_root(nvcc: str) -> Path:
    """The toolkit's folder as nvcc itself sees it: the nvcc that was found may be a wrapper script elsewhere."""
    command = [nvcc, "--dryrun", "-E", os.devnull, "-x", "cu"]
    report = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", report, flags=re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parent.parent


def cuda_library_dirs(root: Path) -> list[str]:
    """Folders of a toolkit (a full one, a distribution's, or pip's) that hold the static CUDA runtime."""
    folders = [
        root / "lib64",
        root / "lib",
        *sorted(root.glob("targets/*-linux/lib")),
        root.parent / "cuda_runtime/lib",
    ]
    found = [str(folder) for folder in folders if (folder / CUDA_RUNTIME).is_file()]
    if not found:
        sys.exit(
            f"megatron_lightseq: nvcc was found, but {CUDA_RUNTIME} is not in {', '.join(map(str, folders))}. "
            "Install the CUDA runtime (pip: nvidia-cuda-runtime), set CUDA_HOME to a full toolkit, or set MLS_CUDA=0."
        )
    return found


class BuildKernels(build_ext):
    """Compiles sources in parallel, CUDA ones with nvcc, and reports in one line what was built."""

    def build_extensions(self) -> None:
        """Compile everything, then let setuptools link."""
        extension = self.extensions[0]
        cuda_sources = sorted((CSRC / "cuda").glob("*.cu"))
        nvcc = find_nvcc() if cuda_sources else None
        if nvcc:  # so that objects of another build are not mistaken for this one's
            self.build_temp = os.path.join(self.build_temp, "cuda-" + "-".join(CUDA_ARCHS))
        os.makedirs(self.build_temp, exist_ok=True)
        try:
            if nvcc:
                self.add_cuda(extension, nvcc, cuda_sources)
            self.write_source_hash(extension)
            self.compile_in_parallel()
            super().build_extensions()
        except subprocess.CalledProcessError as error:
            sys.exit(f"megatron_lightseq: nvcc failed ({error}). Fix it, or build without CUDA: MLS_CUDA=0.")
        except (CompileError, ExecError, LinkError) as error:
            sys.exit(
                f"megatron_lightseq: the C++ kernel was not built, because this failed: {str(error)[:200]} ... "
                "The compiler's own message is above. A C++20 compiler is needed (g++ 12 or later; Debian and Ubuntu: "
                "apt-get install g++)."
            )
        cuda = f"CUDA ({';'.join(CUDA_ARCHS)})" if nvcc else f"no CUDA ({why_no_cuda(cuda_sources)})"
        print(f"megatron_lightseq: built the CPU kernel and the planner; {cuda}", file=sys.stderr)

    def write_source_hash(self, extension: Extension) -> None:
        """Add a source that says which sources are compiled; a module that is older than them refuses to run."""
        path = Path(self.build_temp, "source_hash.cpp")
        text = f'namespace mls {{ extern const char* const kSourceHash = "{source_hash()}"; }}\n'
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        extension.sources.append(str(path))

    def compile_in_parallel(self) -> None:
        """Compile here and hand the objects to the linker: setuptools itself compiles one source at a time."""
        headers = max(path.stat().st_mtime for path in [*CSRC.rglob("*.h"), Path(__file__)])

        def compile_one(extension: Extension, source: str) -> str:
            target = Path(*self.compiler.object_filenames([source], output_dir=self.build_temp))
            if not target.exists() or target.stat().st_mtime < max(headers, (ROOT / source).stat().st_mtime):
                macros = [f"-D{name}={value}" for name, value in extension.define_macros]
                self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=extension.include_dirs,
                    extra_postargs=[*extension.extra_compile_args, *macros],
                )
            return str(target)

        with ThreadPoolExecutor(max_jobs()) as pool:
            jobs = [
                (extension, [pool.submit(compile_one, extension, source) for source in extension.sources])
                for extension in self.extensions
            ]
        for extension, objects in jobs:
            extension.extra_objects += [job.result() for job in objects]
            extension.depends = extension.extra_objects  # otherwise an existing module is never linked again
            extension.sources = []

    def add_cuda(self, extension: Extension, nvcc: str, sources: list[Path]) -> None:
        """Compile the CUDA sources and add their objects, libraries and macros to the extension."""
        library_dirs = cuda_library_dirs(cuda_root(nvcc))
        headers = max(
            path.stat().st_mtime for path in [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), Path(__file__)]
        )
        archs = [gencode(arch) for arch in CUDA_ARCHS]

        def compile_one(source: Path) -> str:
            target = Path(self.build_temp) / f"{source.stem}.cu.o"
            if not target.exists() or target.stat().st_mtime < max(headers, source.stat().st_mtime):
                include = ["-I", str(CSRC / "include"), "-I", str(CSRC)]
                command = [nvcc, *NVCC_FLAGS, *archs, *include, "-c", str(source), "-o", str(target)]
                subprocess.check_call(command)
            return str(target)

        with ThreadPoolExecutor(max_jobs()) as pool:
            extension.extra_objects += list(pool.map(compile_one, sources))
        extension.library_dirs += library_dirs
        # Linked statically, so that the module can be imported on machines without a driver.
        extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        extension.define_macros += [("MLS_WITH_CUDA", "1"), ("MLS_CUDA_ARCHS", f'"{";".join(CUDA_ARCHS)}"')]


def cuda_archs() -> list[str]:
    """The compute capabilities in MLS_CUDA_ARCHS: 80, 80+PTX, 90a ..."""
    wanted = os.environ.get("MLS_CUDA_ARCHS", "80+PTX;90a").split(";")
    for arch in wanted:
        number = re.fullmatch(r"(\d+)[af]?(\+PTX)?", arch)
        if number is None or int(number[1]) < 80:
            sys.exit(
                f"MLS_CUDA_ARCHS: {arch!r} is not a compute capability of 80 or later. Write, for example, 80+PTX;90a, "
                "where +PTX adds code that drivers compile for later GPUs."
            )
    return wanted


def gencode(arch: str) -> str:
    """nvcc's flag for one of MLS_CUDA_ARCHS."""
    number, ptx, _ = arch.partition("+PTX")
    code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


CUDA_ARCHS = cuda_archs()


def why_no_cuda(sources: list[Path]) -> str:
    """Why only the CPU kernel was built."""
    if not sources:
        return "this version has no CUDA sources"
    return "MLS_CUDA=0" if os.environ.get("MLS_CUDA") == "0" else "no nvcc found"


def main() -> None:
    """What pip and ``python setup.py`` run."""
    check_setuptools()
    import pybind11
    from torch.utils.cpp_extension import CppExtension

    setup(
        ext_modules=[
            CppExtension(
                "megatron_lightseq._C",
                relative(
                    [*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp"), *(CSRC / "cpu/linear").glob("*.cpp")]
                ),
                include_dirs=[str(CSRC / "include"), str(CSRC)],
                extra_compile_args=CXX_FLAGS,
                py_limited_api=True,
            ),
            Extension(
                "megatron_lightseq._plan",
                relative([*(CSRC / "plan").glob("*.cpp")]),
                include_dirs=[pybind11.get_include(), str(CSRC)],
                extra_compile_args=PLAN_FLAGS,
                language="c++",
            ),
        ],
        cmdclass={"build_ext": BuildKernels},
    )


if __name__ == "__main__":
    main()
