"""Long-lived processes that train cell after cell: an import of Megatron costs more than a step.

Every process walks the same list of cells. Rank 0 announces each through the store; the ranks that a cell needs form
a process group for it and dissolve it again, the others wait for the next announcement.
"""

from __future__ import annotations

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
from megatron_lightseq.tools.verify.cells import Cell, Tolerance, Values
from megatron_lightseq.tools.verify.parity import (
    Outcome,
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
PATIENCE = timedelta(hours=2)
"""How long a rank that a cell does not need waits for the next one."""

_BEGIN, _PASS_BY = "begin", "pass by"
"""What rank 0 announces of a cell; the latter if it could not make the reference: nobody waits for it then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One cell's end."""

    cell: Cell
    seconds: float
    verdict: Verdict | None
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it ran and was within its tolerance."""
        return self.verdict is not None and self.verdict.passed


@dataclass(slots=True, kw_only=True)
class Walk:
    """The cells, as one rank goes through them."""

    rank: int
    store: dist.Store
    cells: Sequence[Cell]
    extra: Values
    """Configuration that the user adds to every cell."""
    processes: Sequence[BaseProcess] = ()
    """Those that rank 0 has started."""
    _references: dict[str, Outcome] = field(default_factory=dict)

    def follow(self) -> None:
        """Take part in every cell that needs this rank (not rank 0)."""
        for index, cell in enumerate(self.cells):
            self.store.wait([f"cell {index}"], PATIENCE)
            called = self.store.get(f"cell {index}").decode() == _BEGIN
            if called and self.rank < cell.world_size:
                try:
                    self._train(f"cell {index}", cell.world_size, {**cell.model, **cell.values})
                except Exception as error:  # noqa: BLE001 - told to rank 0, and the next cell begins
                    self.store.set(f"error {index} {self.rank}", f"rank {self.rank}: {_first_line(error)}")

    def lead(self) -> Iterator[Report]:
        """Run the cells on rank 0, with one process for comparison first; a report each."""
        for index, cell in enumerate(self.cells):
            began = time.perf_counter()
            verdict, error = None, None
            try:
                reference, tolerance = self._reference(cell)
                self.store.set(f"cell {index}", _BEGIN)
                outcome = self._train(f"cell {index}", cell.world_size, {**cell.model, **cell.values})
                assert outcome is not None, "rank 0 collects"
                verdict = compare(outcome, reference, tolerance)
            except Exception as failure:  # noqa: BLE001 - reported as a cell that failed
                self.store.set(f"cell {index}", _PASS_BY)
                error = "; ".join(self._errors(index, cell) or [f"rank 0: {_first_line(failure)}"])
            yield Report(cell=cell, seconds=time.perf_counter() - began, verdict=verdict, error=error)
            if any(not process.is_alive() for process in self.processes):
                break

    def _reference(self, cell: Cell) -> tuple[Outcome, Tolerance]:
        """What a cell is compared with, and how far from it the cell may be."""
        reference = self._alone(reference_values(cell))
        if not cell.model.get("bf16"):
            return reference, cell.tolerance
        exact = self._alone(exact_values(cell))
        return exact, budget(reference, exact, cell.tolerance)

    def _alone(self, values: Values) -> Outcome:
        """One process, trained once."""
        key = repr(sorted(values.items()))
        if key not in self._references:
            outcome = self._train(f"reference {key}", 1, values)
            assert outcome is not None, "rank 0 collects"
            self._references[key] = outcome
        return self._references[key]

    def _train(self, name: str, world_size: int, values: Values) -> Outcome | None:
        config = configure(values, self.extra)
        store = dist.PrefixStore(name, self.store)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=world_size, timeout=CELL_TIMEOUT
        )
        try:
            return run_step(config)
        finally:
            dist.destroy_process_group()

    def _errors(self, index: int, cell: Cell) -> list[str]:
        """What other ranks said before rank 0 lost patience with them."""
        keys = [f"error {index} {rank}" for rank in range(1, cell.world_size)]
        return [self.store.get(key).decode() for key in keys if self.store.check([key])]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


@contextmanager
def local_ranks(num_processes: int, cells: Sequence[Cell], extra: Values) -> Iterator[Walk]:
    """This process as rank 0, and as many others on this machine as are needed."""
    _prepare(0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_follow, args=(rank, store.port, list(cells), dict(extra)), daemon=True)
        for rank in range(1, num_processes)
    ]
    for process in processes:
        process.start()
    try:
        yield Walk(rank=0, store=store, cells=cells, extra=extra, processes=processes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def launched_ranks(launch: Launch, cells: Sequence[Cell], extra: Values) -> Walk:
    """The ranks that torchrun has started, on one machine or several."""
    _prepare(launch.local_rank)
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    return Walk(rank=launch.rank, store=store, cells=cells, extra=extra)


def _follow(rank: int, port: int, cells: list[Cell], extra: dict[str, object]) -> None:
    """Main function of a process that :func:`local_ranks` starts."""
    _prepare(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    Walk(rank=rank, store=store, cells=cells, extra=extra).follow()


def _prepare(local_rank: int) -> None:
    """A device and one thread for this process: its peers share the machine's cores."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return
    torch.set_num_threads(1)
    cpu_platform.activate()


def most_processes(asked: int | None) -> int:
    """How many ranks this machine may run: as many as it has GPUs, or, on CPUs, as the largest cell wants."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else max(8, os.cpu_count() or 1)
    return min(available, 8 if asked is None else asked)
