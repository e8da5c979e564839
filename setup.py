"""Builds megatron_lightseq._C: the CPU kernel always, the CUDA kernel where nvcc is found.

Three machines are all well: a C++ compiler only; nvcc without a GPU; nvcc and a GPU. CUDA sources are compiled
by nvcc directly, because torch's CUDAExtension refuses to work under a CPU-only torch.

Environment:
    MLS_CUDA        auto (default) | 0 (never) | 1 (fail without nvcc)
    MLS_CUDA_ARCHS  compute capabilities, default "80+PTX;90a": native code of the first, which also serves 8.6 and
                    8.9, with PTX that drivers compile for what comes after 9.0; native code for Hopper alone
    MAX_JOBS        parallel compilations, default: one per core
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, LinkError
from torch.utils.cpp_extension import CppExtension

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# The oldest torch whose stable ABI we use: 2.11.0.
TORCH_TARGET_VERSION = "0x020b000000000000"
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # setuptools asks for -g; debug information would be most of the file
    "-Wall",
    "-Wno-psabi",  # vectors wider than the default target are passed only between inlined functions
    "-fvisibility=hidden",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    "-DPy_LIMITED_API=0x030b0000",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC"]


def max_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted(paths)]


def find_nvcc() -> str | None:
    """The CUDA compiler, or None when it is absent or not wanted."""
    choice = os.environ.get("MLS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"MLS_CUDA={choice}: it must be auto, 0 or 1.")
    if choice == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    for path in [*candidates, shutil.which("nvcc") or ""]:
        if os.path.isfile(path):
            return path
    if choice == "1":
        sys.exit(
            "MLS_CUDA=1: no nvcc in CUDA_HOME, /usr/local/cuda or PATH. Install the CUDA toolkit or unset it."
        )
    return None


class BuildKernels(build_ext):
    """Compiles sources side by side, CUDA ones with nvcc, and says in one line what was built."""

    def build_extensions(self) -> None:
        extension = self.extensions[0]
        cuda_sources = sorted((CSRC / "cuda").glob("*.cu"))
        nvcc = find_nvcc() if cuda_sources else None
        if nvcc:  # objects of another build must not be taken for this one's
            self.build_temp = os.path.join(self.build_temp, "cuda-" + "-".join(CUDA_ARCHS))
        os.makedirs(self.build_temp, exist_ok=True)
        try:
            if nvcc:
                self.add_cuda(extension, nvcc, cuda_sources)
            self.compile_in_parallel(extension)
            super().build_extensions()
        except subprocess.CalledProcessError as error:
            sys.exit(f"megatron_lightseq: nvcc failed ({error}). Fix it, or build without CUDA: MLS_CUDA=0.")
        except (CompileError, ExecError, LinkError) as error:
            sys.exit(
                f"megatron_lightseq: the C++ kernel was not built, because this failed: {str(error)[:200]} ... "
                "Its own words are above. It needs a C++20 compiler (g++ 12 or later; Debian and Ubuntu: "
                "apt-get install g++)."
            )
        cuda = f"CUDA ({';'.join(CUDA_ARCHS)})" if nvcc else f"no CUDA ({why_no_cuda(cuda_sources)})"
        print(f"megatron_lightseq: built the CPU kernel; {cuda}", file=sys.stderr)

    def compile_in_parallel(self, extension: Extension) -> None:
        """Objects are compiled here and handed to the linker; distutils alone takes one source at a time."""
        headers = max(path.stat().st_mtime for path in [*CSRC.rglob("*.h"), Path(__file__)])
        flags = [
            *extension.extra_compile_args,
            *[f"-D{name}={value}" for name, value in extension.define_macros],
        ]

        def compile_one(source: str) -> str:
            target = Path(self.build_temp) / Path(source).with_suffix(".o")
            if not target.exists() or target.stat().st_mtime < max(headers, (ROOT / source).stat().st_mtime):
                self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    include_dirs=extension.include_dirs,
                    extra_postargs=flags,
                )
            return str(target)

        with ThreadPoolExecutor(max_jobs()) as pool:
            extension.extra_objects += list(pool.map(compile_one, extension.sources))
        extension.depends = extension.extra_objects  # else a module that exists is never linked again
        extension.sources = []

    def add_cuda(self, extension: Extension, nvcc: str, sources: list[Path]) -> None:
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
        home = Path(nvcc).resolve().parent.parent
        extension.library_dirs += [str(home / name) for name in ("lib64", "lib") if (home / name).is_dir()]
        # Static: the module then imports on machines without a driver.
        extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        extension.define_macros += [("MLS_WITH_CUDA", "1"), ("MLS_CUDA_ARCHS", f'"{";".join(CUDA_ARCHS)}"')]


def cuda_archs() -> list[str]:
    """What MLS_CUDA_ARCHS asks for, one compute capability each: 80, 80+PTX, 90a ..."""
    wanted = os.environ.get("MLS_CUDA_ARCHS", "80+PTX;90a").split(";")
    for arch in wanted:
        number = re.fullmatch(r"(\d+)[af]?(\+PTX)?", arch)
        if number is None or int(number[1]) < 80:
            sys.exit(
                f"MLS_CUDA_ARCHS: {arch!r} is no compute capability from 80 on. Write for example 80+PTX;90a, "
                "where +PTX adds code that drivers compile for later GPUs."
            )
    return wanted


def gencode(arch: str) -> str:
    number, ptx, _ = arch.partition("+PTX")
    code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


CUDA_ARCHS = cuda_archs()


def why_no_cuda(sources: list[Path]) -> str:
    if not sources:
        return "this version has no CUDA sources"
    return "MLS_CUDA=0" if os.environ.get("MLS_CUDA") == "0" else "no nvcc found"


setup(
    ext_modules=[
        CppExtension(
            "megatron_lightseq._C",
            relative([CSRC / "bindings.cpp", *(CSRC / "cpu").glob("*.cpp")]),
            include_dirs=[str(CSRC / "include"), str(CSRC)],
            extra_compile_args=CXX_FLAGS,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
