"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ against emulated GPU primitives.

The library is built once per content of csrc (a few seconds) and called through ctypes with numpy arrays; see
csrc/cuda/emulation/machine.h for what this can verify.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron_lightseq.kernels.cuda import GradientTargets, head_parts
from megatron_lightseq.kernels.tile_mask import TileMask

CSRC = Path(__file__).resolve().parents[2] / "csrc"
COMPILER = shutil.which("g++")
FLAGS = ("-std=c++20", "-march=x86-64-v3", "-fPIC", "-pthread")
KERNELS = "library.cpp"
OPTIMISATION = "-O1"
"""Tests run as fast as with -O2, because most of their time is spent in the emulator; the kernels compile in two thirds
of the time."""
MULTIPROCESSORS = 2
"""Number of multiprocessors of the emulated GPU, as in csrc/cuda/emulation/sm80.h."""
QUERY_TILES = 3
SMALL_LIMITS = (f"-DMLS_BACKWARD_QUERY_TILES={QUERY_TILES}", "-DMLS_CACHED_BYTES=65536")
"""Small limits, so that small tests need several launches and several sections of the work order."""
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def missing() -> str | None:
    """Why the emulator cannot run here, or None."""
    if platform.machine() != "x86_64":
        return f"the GPU emulator needs x86-64, this is {platform.machine()}"
    return None if COMPILER else "the GPU emulator needs g++"


class EmulationError(Exception):
    """The emulator detected an error in a kernel."""


class Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("queries", "keys", "batch", "heads", "groups", "head_dim", "value_dim")
    ]


class StridedTensor(ctypes.Structure):
    """TokenTensor and RowTensor of csrc/include/attention_params.h: a pointer and three strides."""

    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]


class Mask(ctypes.Structure):
    _fields_ = [
        ("band_lo", ctypes.c_int64),
        ("band_hi", ctypes.c_int64),
        ("range_begin", ctypes.c_void_p),
        ("range_end", ctypes.c_void_p),
    ]


class ForwardParams(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("element_type", ctypes.c_int),
        *[(name, StridedTensor) for name in ("q", "k", "v", "out", "lse")],
        ("mask", Mask),
        ("softmax_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("accumulate", ctypes.c_bool),
        ("rounded_out", StridedTensor),
    ]


class BackwardParams(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        ("element_type", ctypes.c_int),
        *[(name, StridedTensor) for name in ("dout", "q", "k", "v", "lse", "delta", "dq", "dk", "dv")],
        ("mask", Mask),
        ("softmax_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("accumulate", ctypes.c_bool),
        *[(name, StridedTensor) for name in ("rounded_dq", "rounded_dk", "rounded_dv")],
    ]


class BackwardOptions(ctypes.Structure):
    _fields_ = [("deterministic", ctypes.c_bool), ("head_parts", ctypes.c_int)]


class DeltaParams(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("queries", "batch", "heads", "value_dim")],
        *[(name, ctypes.c_int) for name in ("out_type", "dout_type")],
        *[(name, StridedTensor) for name in ("out", "dout", "delta")],
    ]


class Statistics(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("mma", "ldmatrix", "shuffles", "barriers", "async_copies", "wgmma", "bank_conflicts")
    ]


def _shape(q: Tensor, k: Tensor, v: Tensor) -> Shape:
    return Shape(q.shape[0], k.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])


def _strided(x: Tensor) -> StridedTensor:
    return StridedTensor(x.data_ptr(), (ctypes.c_int64 * 3)(*x.stride()[:3]))


def _sums(x: Tensor) -> StridedTensor:
    """The result if it is fp32, otherwise a null tensor."""
    return _strided(x) if x.dtype == torch.float32 else StridedTensor()


def _rounded(x: Tensor) -> StridedTensor:
    """The result if it has the dtype of the inputs, otherwise a null tensor."""
    return StridedTensor() if x.dtype == torch.float32 else _strided(x)


def _mask(mask: TileMask, queries: int, keys: int) -> Mask:
    clamped = [min(max(bound, -queries - 1), keys) for bound in (mask.band_lo, mask.band_hi)]
    if mask.key_ranges is None:
        return Mask(*clamped, None, None)
    return Mask(*clamped, mask.key_ranges[0].data_ptr(), mask.key_ranges[1].data_ptr())


def _compile(arguments: list[str]) -> None:
    result = subprocess.run([str(COMPILER), *FLAGS, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise EmulationError(f"the emulated kernels do not compile: {result.stderr[:2000]}")


def build_machine(csrc: Path, folder: Path) -> list[str]:
    """Compiles the emulator itself, without kernels, and returns its object files."""
    objects = []
    for source in sorted((csrc / "cuda" / "emulation").glob("*.cpp")):
        if source.name != KERNELS:
            objects.append(str(folder / f"{source.stem}.o"))
            _compile(["-O2", "-c", f"-I{csrc}", f"-I{csrc / 'include'}", str(source), "-o", objects[-1]])
    return objects


def build_library(csrc: Path, machine: list[str], target: Path, *options: str) -> None:
    """Compiles the kernels of a csrc tree and links them with the emulator.

    Raises:
        EmulationError: compilation fails; the message contains the compiler's first errors.
    """
    source = str(csrc / "cuda" / "emulation" / KERNELS)
    includes = [f"-I{csrc}", f"-I{csrc / 'include'}"]
    _compile([*options, *includes, source, *machine, "-shared", "-o", str(target)])


def cached_library() -> Path:
    """The library of this checkout. It is built unless one for the same sources exists."""
    digest = hashlib.sha256(" ".join((*FLAGS, OPTIMISATION, *SMALL_LIMITS)).encode())
    for path in sorted([*(CSRC / "cuda").rglob("*"), *(CSRC / "include").glob("*.h")]):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"mls_emulator_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest.hexdigest()[:20]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unfinished = Path(scratch) / "library.so"
            build_library(CSRC, build_machine(CSRC, Path(scratch)), unfinished, OPTIMISATION, *SMALL_LIMITS)
            unfinished.rename(library)
    return library


_NO_KERNEL = b"the library has no kernel for these head dims"


@dataclass
class Emulator:
    """The kernels of one architecture (``sm80``, or ``sm90`` where it has its own) as a ``Kernel``."""

    path: Path
    architecture: str = "sm80"
    deterministic: bool = False
    seed: int = 1
    threads: int = 1
    refuses_tensor_maps: bool = False
    """Whether to simulate a driver that refuses tensor maps, which the Hopper kernels need."""
    name: str = "emulated-cuda"
    rounds_results: bool = True

    @cached_property
    def library(self) -> ctypes.CDLL:
        library = ctypes.CDLL(str(self.path))
        for direction in ("forward", "backward"):
            for architecture in ("sm80", "sm90"):
                if function := getattr(library, f"mls_emu_{direction}_{architecture}", None):
                    function.restype = ctypes.c_char_p
        library.mls_emu_configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_bool]
        library.mls_emu_fallback.restype = ctypes.c_char_p
        return library

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return None

    def statistics(self) -> Statistics:
        """Counts since the last call."""
        counts = Statistics()
        self.library.mls_emu_statistics(ctypes.byref(counts))
        return counts

    def fallback(self) -> str | None:
        """Why the last call ran a kernel for compute capability 8.0 on Hopper. Reported once per kernel."""
        reason = self.library.mls_emu_fallback()
        return None if reason is None else str(reason.decode())

    def _call(self, direction: str, params: ctypes.Structure, *arguments: object) -> None:
        self.library.mls_emu_configure(self.seed, self.threads, self.refuses_tensor_maps)
        for architecture in dict.fromkeys(
            (self.architecture, "sm80")
        ):  # like the dispatch: the newest kernel that exists
            function = getattr(self.library, f"mls_emu_{direction}_{architecture}")
            failure = function(ctypes.byref(params), *arguments)
            if failure != _NO_KERNEL:
                break
        if failure is not None:
            raise EmulationError(failure.decode())

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        mask: TileMask,
        softmax_scale: float,
        accumulate: bool,
        softcap: float = 0.0,
    ) -> None:
        self._call(
            "forward",
            ForwardParams(
                _shape(q, k, v),
                ELEMENT_TYPES[q.dtype],
                *[_strided(x) for x in (q, k, v)],
                _sums(out),
                _strided(lse),
                _mask(mask, q.shape[0], k.shape[0]),
                softmax_scale,
                softcap,
                accumulate,
                _rounded(out),
            ),
        )

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        *,
        mask: TileMask,
        softmax_scale: float,
        accumulate: bool = True,
        softcap: float = 0.0,
    ) -> None:
        keys, batch, groups = k.shape[:3]
        group = q.shape[2] // groups
        divides = self.architecture == "sm90" and not self.deterministic
        parts = head_parts(keys, batch, groups, group, MULTIPROCESSORS) if divides else 1
        targets = GradientTargets.prepare(
            (dq, dk, dv),
            accumulate=accumulate,
            deterministic=self.deterministic,
            parts=parts,
            is_one_launch=self.architecture == "sm80" or q.shape[0] <= 64 * QUERY_TILES,
        )
        read = (dout, q, k, v, lse, delta)
        params = self.backward_params(read, targets.written, mask, softmax_scale, accumulate, softcap)
        self.call_backward(params, BackwardOptions(self.deterministic, parts))
        targets.finish()

    def backward_params(
        self,
        read: tuple[Tensor, ...],
        written: tuple[Tensor, ...],
        mask: TileMask,
        softmax_scale: float,
        accumulate: bool,
        softcap: float = 0.0,
    ) -> BackwardParams:
        """The arguments of the compiled backward pass: dout, q, k, v, lse and delta, and dq, dk and dv."""
        _, q, k, v, _, _ = read
        return BackwardParams(
            _shape(q, k, v),
            ELEMENT_TYPES[q.dtype],
            *[_strided(x) for x in read],
            *[_sums(x) for x in written],
            _mask(mask, q.shape[0], k.shape[0]),
            softmax_scale,
            softcap,
            accumulate,
            *[_rounded(x) for x in written],
        )

    def call_backward(self, params: BackwardParams, options: BackwardOptions) -> None:
        """Runs the compiled backward pass.

        Raises:
            EmulationError: it refuses the arguments, or does something that a GPU does not allow.
        """
        self._call("backward", params, ctypes.byref(options))

    def delta(self, out: Tensor, dout: Tensor) -> Tensor:
        """The sums of ``out * dout`` over Dv, (B, H, S), by csrc/cuda/delta.h."""
        tokens, batch, heads, value_dim = out.shape
        delta = torch.full((batch, heads, tokens), float("nan"))
        self.library.mls_emu_configure(self.seed, self.threads, self.refuses_tensor_maps)
        self.library.mls_emu_delta.restype = ctypes.c_char_p
        types = [ELEMENT_TYPES[x.dtype] for x in (out, dout)]
        strided = [_strided(x) for x in (out, dout, delta)]
        failure = self.library.mls_emu_delta(
            ctypes.byref(DeltaParams(tokens, batch, heads, value_dim, *types, *strided))
        )
        if failure is not None:
            raise EmulationError(failure.decode())
        return delta
