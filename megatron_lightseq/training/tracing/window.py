"""Which steps of a run are traced, and what becomes of the trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_lightseq.attention.trace import Trace, clock_of
from megatron_lightseq.training.setup import Training
from megatron_lightseq.training.tracing.chrome import write
from megatron_lightseq.training.tracing.gather import gather, host_identity, measure_link, network_of
from megatron_lightseq.training.tracing.predict import compare, describe, typical
from megatron_lightseq.training.tracing.regions import install
from megatron_lightseq.training.tracing.times import read_trace
from megatron_lightseq.transport import connect

TRACE_NAME, PICTURE_NAME = "trace.json", "trace.png"


class Tracing:
    """Traces the steps of a run that its configuration asks for, once."""

    def __init__(self, training: Training) -> None:
        logging = training.config.logging
        self._training = training
        self._folder = None if logging.trace is None else Path(logging.trace)
        self._first, self._last = logging.trace_step_start, logging.trace_step_end
        self._trace: Trace | None = None
        self._undo = ExitStack()
        self._traced: list[int] = []

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """A context that is a training step."""
        if self._folder is not None and self._first <= step <= self._last:
            self._begin()
        if self._trace is None:
            yield
            return
        with self._trace.region(f"step {step}"):
            yield
        self._traced.append(step)

    def ends_with(self, step: int) -> bool:
        """Whether this was the last step to trace."""
        return self._trace is not None and step >= self._last

    def _begin(self) -> None:
        if self._trace is None:
            self._trace = Trace(clock_of(self._training.device))
            self._undo = install(self._trace, self._training)

    def finish(self) -> list[str]:
        """Stop tracing and write what there is, on rank 0. Collective over the world.

        Returns:
            Lines for the user; none if nothing was traced, and on other ranks.
        """
        trace, folder, self._trace = self._trace, self._folder, None
        if trace is None or folder is None:
            return []
        self._undo.close()
        self._folder = None  # once
        group, device = self._training.collection.cp, self._training.device
        mine = read_trace(
            trace,
            rank=dist.get_rank(),
            peers=dist.get_process_group_ranks(group),
            host=host_identity(),
            link=measure_link(connect(group) if group.size() > 1 else None, device),
        )
        ranks = gather(mine, device)
        if not ranks:
            return []
        context = self._training.config.context
        network = network_of(ranks[0]) if context.network is None else context.network
        compared = compare(ranks, network, overlap=context.cp_overlap)
        write(folder / TRACE_NAME, ranks, compared)
        lines = [f"trace of steps {self._traced[0]}-{self._traced[-1]}: {folder / TRACE_NAME}"]
        if compared:
            from megatron_lightseq.training.tracing.picture import draw_trace

            draw_trace(typical(compared), folder / PICTURE_NAME)
            lines += [*describe(compared), f"measured and predicted: {folder / PICTURE_NAME}"]
        return lines
