"""Processes that train one cell after another: importing Megatron takes longer than a training step.

All processes go through the same list of cells. Rank 0 announces each cell through the store. The ranks that it needs
form a process group and dissolve it afterwards; the others wait for the next announcement.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess

import torch
import torch.distributed as dist

from megatron_lightseq.megatron.cpu import platform as cpu_platform
from megatron_lightseq.megatron.rope import forget_angles
from megatron_lightseq.tools.verify.cells import Cell, Tolerance, Values
from megatron_lightseq.tools.verify.parity import (
    TrainedStep,
    Verdict,
    budget,
    compare,
    configure,
    exact_values,
    reference_values,
    run_step,
)
from megatron_lightseq.training.job.launch import Launch

CELL_TIMEOUT = timedelta(seconds=120)
"""How long a rank waits for another within a cell."""
MATRIX_TIMEOUT = timedelta(hours=2)
"""How long a rank that a cell does not need waits for the next one."""

_BEGIN, _SKIP = "begin", "skip"
"""What rank 0 announces about a cell; it is skipped if its reference could not be trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of one cell."""

    cell: Cell
    seconds: float
    verdict: Verdict | None
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it ran, with differences within its tolerance."""
        return self.verdict is not None and self.verdict.passed


@dataclass(slots=True, kw_only=True)
class Verification:
    """The cells, and one rank's part in training them."""

    rank: int
    store: dist.Store
    cells: Sequence[Cell]
    extra: Values
    """The user's values for all cells."""
    processes: Sequence[BaseProcess] = ()
    """Processes that rank 0 has started."""
    _references: dict[str, TrainedStep] = field(default_factory=dict)

    def follow(self) -> None:
        """Take part in all cells that need this rank; for ranks other than 0."""
        for index, cell in enumerate(self.cells):
            self.store.wait([f"cell {index}"], MATRIX_TIMEOUT)
            begins = self.store.get(f"cell {index}").decode() == _BEGIN
            if begins and self.rank < cell.world_size:
                try:
                    self._train_cell(index, cell)
                except Exception as error:  # noqa: BLE001 - reported to rank 0; the next cell follows
                    self.store.set(f"error {index} {self.rank}", f"rank {self.rank}: {_first_line(error)}")

    def lead(self) -> Iterator[Report]:
        """Run all cells on rank 0, each after its single-process reference; yields a report per cell."""
        for index, cell in enumerate(self.cells):
            began = time.perf_counter()
            verdict, error = None, None
            try:
                reference, tolerance = self._reference(cell)
                self.store.set(f"cell {index}", _BEGIN)
                outcome = self._train_cell(index, cell)
                assert outcome is not None, "rank 0 collects"
                verdict = compare(outcome, reference, tolerance)
            except Exception as failure:  # noqa: BLE001 - reported as a cell that failed
                self.store.set(f"cell {index}", _SKIP)
                error = "; ".join(self._errors(index, cell) or [f"rank 0: {_first_line(failure)}"])
            yield Report(cell=cell, seconds=time.perf_counter() - began, verdict=verdict, error=error)
            if any(not process.is_alive() for process in self.processes):
                break

    def _reference(self, cell: Cell) -> tuple[TrainedStep, Tolerance]:
        """The reference of a cell, and the allowed differences from it."""
        reference = self._alone(reference_values(cell), cell.dense_mask)
        if not cell.model.get("bf16"):
            return reference, cell.tolerance
        exact = self._alone(exact_values(cell), cell.dense_mask)
        return exact, budget(reference, exact, cell.tolerance)

    def _alone(self, values: Values, dense_mask: bool) -> TrainedStep:
        """A single process with these values; trained once and remembered."""
        key = repr((dense_mask, sorted(values.items())))
        if key not in self._references:
            outcome = self._train(f"reference {key}", 1, values, dense_mask=dense_mask)
            assert outcome is not None, "rank 0 collects"
            self._references[key] = outcome
        return self._references[key]

    def _train_cell(self, index: int, cell: Cell) -> TrainedStep | None:
        more = {"dense_mask": cell.dense_mask, "evaluated_first": cell.evaluated_first}
        return self._train(f"cell {index}", cell.world_size, {**cell.model, **cell.values}, **more)

    def _train(self, name: str, world_size: int, values: Values, **more: bool) -> TrainedStep | None:
        config = configure(values, self.extra)
        store = dist.PrefixStore(name, self.store)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=world_size, timeout=CELL_TIMEOUT
        )
        try:
            return run_step(config, **more)
        finally:
            dist.destroy_process_group()
            _free_groups()

    def _errors(self, index: int, cell: Cell) -> list[str]:
        """Errors that other ranks reported."""
        keys = [f"error {index} {rank}" for rank in range(1, cell.world_size)]
        return [self.store.get(key).decode() for key in keys if self.store.check([key])]


def _free_groups() -> None:
    """Free the model of a cell, whose objects refer to each other, and the threads of its process groups with it."""
    forget_angles()
    gc.collect()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


@contextmanager
def local_ranks(num_processes: int, cells: Sequence[Cell], extra: Values) -> Iterator[Verification]:
    """Start the other ranks on this machine; this process is rank 0."""
    _prepare(0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=MATRIX_TIMEOUT)
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_follow, args=(rank, store.port, list(cells), dict(extra)), daemon=True)
        for rank in range(1, num_processes)
    ]
    for process in processes:
        process.start()
    try:
        yield Verification(rank=0, store=store, cells=cells, extra=extra, processes=processes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def launched_ranks(launch: Launch, cells: Sequence[Cell], extra: Values) -> Verification:
    """Use the ranks that torchrun has started, on one or more machines."""
    _prepare(launch.local_rank)
    store, _, _ = next(dist.rendezvous("env://", timeout=MATRIX_TIMEOUT))
    return Verification(rank=launch.rank, store=store, cells=cells, extra=extra)


def _follow(rank: int, port: int, cells: list[Cell], extra: dict[str, object]) -> None:
    """Main function of the processes that :func:`local_ranks` starts."""
    _prepare(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=MATRIX_TIMEOUT)
    Verification(rank=rank, store=store, cells=cells, extra=extra).follow()


def _prepare(local_rank: int) -> None:
    """Select the device, and use one thread: the processes share the cores of the machine."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return
    torch.set_num_threads(1)
    cpu_platform.activate()


def most_processes(asked: int | None) -> int:
    """Maximum number of ranks on this machine: the number of GPUs, or on CPUs the size of the largest cell."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else max(8, os.cpu_count() or 1)
    return min(available, 8 if asked is None else asked)
