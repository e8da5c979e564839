"""Every primitive, bit for bit: the emulator against fixed vectors, and a GPU against the same vectors.

The vectors were written by the emulator (``python -m tests.cuda.test_calibration``) and show how it interprets the PTX
ISA. The test with the marker ``gpu`` checks that interpretation on hardware.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.cuda.emulator import ELEMENT_TYPES, Emulator, cached_library

VECTORS = Path(__file__).with_name("primitive_vectors.npz")


@dataclass(frozen=True)
class Part:
    """The output of one primitive in a group: ``words`` words from each of ``threads`` threads."""

    primitive: str
    threads: int
    words: int


PARTS = {
    "sm80": (
        Part("cp.async, ldmatrix", 32, 4),
        Part("cp.async, ldmatrix.trans", 32, 4),
        Part("ldmatrix.trans as B", 32, 4),
        Part("mma.m16n8k16", 32, 8),
        Part("cvt to 16 bits", 32, 1),
        Part("shfl", 32, 1),
        Part("32-bit stores, read by ldmatrix", 32, 4),
        Part("nothing", 32, 22),
    ),
    "sm90": (
        Part("tensor copy; wgmma of K-major A and B in shared memory", 128, 64),
        Part("wgmma of A in registers and MN-major B", 128, 64),
        Part("wgmma of MN-major A and B", 128, 64),
        Part("wgmma of a panel of MN-major B and of half of the next", 128, 48),
        Part("wgmma with N = 16 from the second panel of MN-major B", 128, 8),
        Part("wgmma with N = 80 of K-major A and B in shared memory", 128, 40),
        Part("wgmma with N = 256 of MN-major B", 128, 128),
        Part("tensor copy beyond the tensor's end", 128, 32),
    ),
    "sm90_gradients": (
        Part("stmatrix, proxy fence; wgmma with N = 32 from the middle of a panel", 128, 16),
        Part("stmatrix", 128, 32),
        Part("tensor reduction", 64, 32),
    ),
}
"""What csrc/cuda/calibration.h logs, in order. Parts with the same number of threads form one log, thread after
thread."""
GROUPS = {group: sum(part.threads * part.words for part in parts) for group, parts in PARTS.items()}
"""Words of output of each PrimitiveGroup of csrc/cuda/calibration.h, in its order."""
VARIANTS = [(dtype, group) for dtype in (torch.bfloat16, torch.float16) for group in GROUPS]
ONE = 0x3F800000
"""fp32 1: the initial value of outputs, which a reduction adds to."""


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """128 x 128 small integers: any order of summation gives the same bits."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-8, 9, (128, 128), generator=generator).to(dtype)


def differences(group: str, got: NDArray[np.uint32], want: NDArray[np.uint32]) -> list[str]:
    """One line per primitive whose words differ: how many differ, and the first one."""
    lines, rest = [], (got, want)
    for threads in dict.fromkeys(part.threads for part in PARTS[group]):
        parts = [part for part in PARTS[group] if part.threads == threads]
        size = threads * sum(part.words for part in parts)
        logs = [words[:size].reshape(threads, -1) for words in rest]
        rest = (rest[0][size:], rest[1][size:])
        first = 0
        for part in parts:
            ours, theirs = (log[:, first : first + part.words] for log in logs)
            first += part.words
            wrong = np.argwhere(ours != theirs)
            if len(wrong):
                thread, word = wrong[0]
                lines.append(
                    f"{part.primitive}: {len(wrong)} of {ours.size} words differ, the first in thread {thread}, "
                    f"word {word}: {ours[thread, word]:#010x}, wanted {theirs[thread, word]:#010x}"
                )
    return lines


def key(dtype: torch.dtype, group: str) -> str:
    return f"{group}_{str(dtype).removeprefix('torch.')}"


def emulated(dtype: torch.dtype, group: str) -> NDArray[np.uint32]:
    library = Emulator(cached_library()).library
    source, output = numbers(dtype), np.full(GROUPS[group], ONE, dtype=np.uint32)
    library.mls_emu_calibrate.restype = ctypes.c_char_p
    failure = library.mls_emu_calibrate(
        list(GROUPS).index(group),
        ELEMENT_TYPES[dtype],
        ctypes.c_void_p(source.data_ptr()),
        output.ctypes.data_as(ctypes.c_void_p),
    )
    assert failure is None, failure
    return output


@pytest.mark.parametrize(("dtype", "group"), VARIANTS, ids=lambda value: str(value))
def test_emulator_still_gives_the_vectors(library: Path, dtype: torch.dtype, group: str) -> None:
    with np.load(VECTORS) as vectors:
        np.testing.assert_array_equal(emulated(dtype, group), vectors[key(dtype, group)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vectors_agree_with_plain_matrix_products(dtype: torch.dtype) -> None:
    """Compares accumulators of wgmma, in the fragment layout of PTX, with products of the same integers."""
    x = numbers(dtype).double()
    with np.load(VECTORS) as vectors:
        words = vectors[key(dtype, "sm90")].view(np.float32).reshape(128, -1)
    pairs = (
        numbers(dtype).flatten()[: 128 * 8].double().view(4, 8, 4, 4, 2)
    )  # warp, row, column pair, register
    a = torch.empty(64, 16, dtype=torch.float64)
    for register in range(4):
        rows = a.view(4, 2, 8, 2, 4, 2)[:, register % 2, :, register // 2]
        rows.copy_(pairs[:, :, :, register])
    panels = torch.cat(
        [x[:64, :64], x[64:, :64], x[:64, 64:], x[64:, 64:]], 1
    )  # the memory as four of 64 rows
    want = (
        x[64:, 80:96] @ x[:, 48:64].T,
        a @ x[32:48, :],
        x[48:64, 64:].T @ x[96:112, :],
        a @ x[16:32, :96],
        a @ x[48:64, 64:80],
        x[64:, 16:32] @ x[:80, 112:].T,
        a @ panels[32:48],
    )
    first = 0
    for product in want:
        columns = product.shape[1]
        part = torch.from_numpy(words[:, first : first + columns // 2].copy())
        got = part.view(4, 8, 4, columns // 8, 2, 2)  # warp, row, pair, tile, half, low
        matrix = got.permute(0, 4, 1, 3, 2, 5).reshape(64, columns)
        torch.testing.assert_close(matrix.double(), product, rtol=0, atol=0)
        first += columns // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vectors_hold_zeros_beyond_the_tensor(dtype: torch.dtype) -> None:
    """A copy of columns 104 to 167 and rows 28 to 155, of which 24 columns and 100 rows exist."""
    with np.load(VECTORS) as vectors:
        words = vectors[key(dtype, "sm90")].reshape(128, -1)[:, -32:]
    chunks = torch.from_numpy(words.copy().view(np.int16)).view(dtype).view(128, 8, 8)
    order = torch.arange(8) ^ torch.arange(128).unsqueeze(1) % 8  # the 128-byte swizzle
    panel = chunks.gather(1, order.unsqueeze(-1).expand(128, 8, 8)).reshape(128, 64)
    want = torch.zeros(128, 64, dtype=dtype)
    want[:100, :24] = numbers(dtype)[28:, 104:]
    assert torch.equal(panel, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vectors_of_gradients_agree_with_plain_tensors(dtype: torch.dtype) -> None:
    """What stmatrix stored, its transposed product with a part of a panel, and the clipped sum in memory."""
    words = numbers(dtype).flatten()[: 64 * 64].view(4, 8, 4, 4, 4, 2)  # warp, row, pair, step, register, low
    stored = torch.empty(64, 64, dtype=dtype)
    for register in range(4):
        part = stored.view(4, 2, 8, 4, 2, 4, 2)[
            :, register % 2, :, :, register // 2
        ]  # warp, row, step, pair, low
        part.copy_(words[:, :, :, :, register].transpose(2, 3))
    with np.load(VECTORS) as vectors:
        log, reduced = np.split(vectors[key(dtype, "sm90_gradients")], [128 * 48])
    sums = torch.from_numpy(log.reshape(128, 48)[:, :16].copy().view(np.float32)).view(4, 8, 4, 4, 2, 2)
    product = stored[16:32].double().T @ numbers(dtype)[48:64, 96:].double()
    assert torch.equal(sums.permute(0, 4, 1, 3, 2, 5).reshape(64, 32).double(), product)
    chunks = torch.from_numpy(log.reshape(128, 48)[:64, 16:].copy().view(np.int16)).view(dtype).view(64, 8, 8)
    order = torch.arange(8) ^ torch.arange(64).unsqueeze(1) % 8  # the 128-byte swizzle
    assert torch.equal(chunks.gather(1, order.unsqueeze(-1).expand(64, 8, 8)).reshape(64, 64), stored)
    want = torch.ones(64, 32)
    want[:50, :24] += 0.5 * product[:50, :24].float()
    assert torch.equal(torch.from_numpy(reduced.copy().view(np.float32)).view(64, 32), want)


@pytest.mark.parametrize(
    ("group", "thread", "word", "named"),
    [
        ("sm80", 3, 2, "cp.async, ldmatrix: 1 of 128 words differ, the first in thread 3, word 2: "),
        ("sm80", 31, 20, "cvt to 16 bits: 1 of 32 words differ, the first in thread 31, word 0: "),
        ("sm90", 127, 192, "wgmma of a panel of MN-major B and of half of the next: 1 of 6144 words "),
        ("sm90_gradients", 5, 16, "stmatrix: 1 of 4096 words differ, the first in thread 5, word 0: "),
    ],
)
def test_a_difference_names_its_primitive(group: str, thread: int, word: int, named: str) -> None:
    threads = PARTS[group][0].threads
    with np.load(VECTORS) as vectors:
        want = vectors[key(torch.bfloat16, group)]
    got = want.copy()
    got[: threads * sum(part.words for part in PARTS[group] if part.threads == threads)].reshape(threads, -1)[
        thread, word
    ] ^= 1
    (line,) = differences(group, got, want)
    assert line.startswith(named)
    got = want.copy()
    got[-1] ^= 1
    assert len(differences(group, got, want)) == 1
    assert differences(group, want, want) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(("dtype", "group"), VARIANTS, ids=lambda value: str(value))
def test_gpu_gives_the_vectors(dtype: torch.dtype, group: str) -> None:
    if group.startswith("sm90") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs compute capability 9.0")
    from megatron_lightseq import _C  # type: ignore[attr-defined]

    function = ctypes.CDLL(_C.__file__).mls_cuda_calibrate
    function.restype = ctypes.c_char_p
    source = numbers(dtype).cuda()
    output = torch.full((GROUPS[group],), ONE, dtype=torch.int32, device="cuda")
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (source, output)]
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    failure = function(list(GROUPS).index(group), ELEMENT_TYPES[dtype], *pointers, stream)
    assert failure is None, failure
    torch.cuda.synchronize()
    with np.load(VECTORS) as vectors:
        wrong = differences(group, output.cpu().numpy().view(np.uint32), vectors[key(dtype, group)])
    assert not wrong, "\n".join(wrong)


def main() -> None:
    results = {key(dtype, group): emulated(dtype, group) for dtype, group in VARIANTS}
    np.savez_compressed(VECTORS, **results)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
