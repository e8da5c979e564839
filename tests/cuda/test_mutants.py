"""Every check has a mutant: bugs seeded into the kernels must not survive the emulated tests."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from tests.cuda.emulator import CSRC, EmulationError, Emulator, build_library, build_machine, missing
from tests.cuda.judge import expect_gradients, expect_output, run_forward
from tests.cuda.mutants import HOPPER_BACKWARD_MUTANTS, HOPPER_MUTANTS, SM80_MUTANTS, Mutant
from tests.kernels.oracle import Case, delta, expect_within_budget, inputs

HEAD_DIMS = {  # few, because they are recompiled for every mutant
    "sm80": (
        "-DMLS_FOR_EACH_HEAD_DIM(X)=X(64, 64)",
        "-DMLS_FOR_EACH_HOPPER_HEAD_DIM(X)=",
        "-DMLS_FOR_EACH_HOPPER_BACKWARD_HEAD_DIM(X)=",
    ),
    # One panel of 64 columns and half of the next.
    "sm90": (
        "-DMLS_FOR_EACH_HEAD_DIM(X)=",
        "-DMLS_FOR_EACH_HOPPER_HEAD_DIM(X)=X(96, 96)",
        "-DMLS_FOR_EACH_HOPPER_BACKWARD_HEAD_DIM(X)=",
        "-DMLS_CACHED_BYTES=200000",  # two heads of three side by side
    ),
    "sm90 backward": (
        "-DMLS_FOR_EACH_HEAD_DIM(X)=",
        "-DMLS_FOR_EACH_HOPPER_HEAD_DIM(X)=",
        "-DMLS_FOR_EACH_HOPPER_BACKWARD_HEAD_DIM(X)=X(128, 128)",
        "-DMLS_BACKWARD_QUERY_TILES=4",  # so that some cases need two launches
    ),
}
HOPPER_BACKWARD_CASES = (
    Case(queries=330, keys=140, heads=2, groups=1, head_dim=128, value_dim=128, band_hi=-20, amplitude=2.0),
    Case(queries=200, keys=130, heads=1, head_dim=128, value_dim=128, ranges="documents"),
    Case(queries=300, keys=400, heads=1, head_dim=128, value_dim=128),
)
HOPPER_CASES = (
    Case(queries=70, keys=600, heads=1, head_dim=96, value_dim=96, band_hi=540, amplitude=3.0),
    Case(queries=140, keys=250, heads=3, groups=3, head_dim=96, value_dim=96),
)
CASES = (
    Case(queries=150, keys=210, heads=2, groups=1, head_dim=64, value_dim=64, band_hi=40, amplitude=3.0),
    Case(queries=70, keys=90, head_dim=64, value_dim=64, band_hi=-20),
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    return build_machine(CSRC, tmp_path_factory.mktemp("machine"))


def examine(library: Path, architecture: str) -> str | None:
    """What is wrong with these kernels, or None if nothing is."""
    run, cases, seeds = {
        "sm80": (run_in_two_parts, CASES, 3),
        "sm90": (forward, HOPPER_CASES, 8),
        "sm90 backward": (backward, HOPPER_BACKWARD_CASES, 8),
    }[architecture]
    for case in cases:
        for seed in range(1, seeds + 1):
            kernel = Emulator(library, architecture.split()[0], deterministic=seed % 2 == 0, seed=seed)
            try:
                run(case, kernel)
            except (AssertionError, EmulationError) as error:
                return str(error)
            if kernel.statistics().bank_conflicts:
                return "bank conflicts"
    return None


def forward(case: Case, kernel: Emulator) -> None:
    tensors = inputs(case, torch.bfloat16)
    expect_output(case, torch.bfloat16, tensors, *run_forward(case, tensors, kernel))


def backward(case: Case, kernel: Emulator) -> None:
    expect_gradients(case, torch.bfloat16, inputs(case, torch.bfloat16), kernel)


def run_in_two_parts(case: Case, kernel: Emulator) -> None:
    """Computes a tile in two halves along the keys, accumulating the results."""
    tensors = q, k, v, dout = inputs(case, torch.bfloat16)
    out = torch.full((case.queries, case.batch, case.heads, case.value_dim), float("nan"))
    lse = torch.full((case.batch, case.heads, case.queries), float("nan"))
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    middle = case.keys * 2 // 3
    options = {"softmax_scale": case.softmax_scale}
    halves = [(slice(0, middle), 0), (slice(middle, case.keys), middle)]
    masks = [type(case.mask())(case.band_lo - first, case.band_hi - first) for _, first in halves]
    for number, (part, _) in enumerate(halves):
        kernel.forward(q, k[part], v[part], out, lse, mask=masks[number], accumulate=number > 0, **options)
    for number, (part, _) in enumerate(halves):
        grads = delta(out, dout), dq, dk[part], dv[part]
        kernel.backward(dout, q, k[part], v[part], lse, *grads, mask=masks[number], **options)
    expect_within_budget(case, torch.bfloat16, tensors, (out, lse, dq, dk, dv))


def mutated(mutant: Mutant, folder: Path) -> Path:
    csrc = folder / "csrc"
    shutil.copytree(CSRC / "cuda", csrc / "cuda")
    shutil.copytree(CSRC / "include", csrc / "include")
    path = csrc / "cuda" / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.name}: the code to change is missing, or not unique"
    path.write_text(text.replace(mutant.old, mutant.new))
    return csrc


class Examiner:
    """Runs :func:`examine` in another process, because a mutant that corrupts memory may crash it."""

    def __init__(self) -> None:
        self._pool = self._new_pool()

    @staticmethod
    def _new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def examine(self, library: Path, architecture: str) -> str | None:
        """What is wrong with the kernels, or None."""
        try:
            return self._pool.submit(examine, library, architecture).result()
        except BrokenProcessPool:
            self._pool = self._new_pool()
            return "the process was killed by a signal"

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


@pytest.fixture(scope="module")
def examiner() -> Iterator[Examiner]:
    made = Examiner()
    yield made
    made.close()


@pytest.mark.parametrize("architecture", HEAD_DIMS)
def test_nothing_is_wrong_without_a_mutant(
    architecture: str, machine: list[str], examiner: Examiner, tmp_path: Path
) -> None:
    build_library(
        CSRC, machine, tmp_path / "library.so", "-O1", "-DMLS_ONE_VARIANT", *HEAD_DIMS[architecture]
    )
    assert examiner.examine(tmp_path / "library.so", architecture) is None


@pytest.mark.parametrize(
    "mutant", SM80_MUTANTS + HOPPER_MUTANTS + HOPPER_BACKWARD_MUTANTS, ids=lambda mutant: mutant.name
)
def test_mutant_is_caught(mutant: Mutant, machine: list[str], examiner: Examiner, tmp_path: Path) -> None:
    options = ("-O1", "-DMLS_ONE_VARIANT", *HEAD_DIMS[mutant.architecture])
    build_library(mutated(mutant, tmp_path), machine, tmp_path / "library.so", *options)
    problem = examiner.examine(tmp_path / "library.so", mutant.architecture)
    assert problem is not None
    assert (problem == "bank conflicts") == mutant.slow
