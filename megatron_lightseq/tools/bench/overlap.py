"""How much communication is hidden by computation: attention only, over a real network, with and without overlap.

Every rank measures the forward and backward pass of :class:`DistAttention`, and how long its host waits for transfers.
The simulator (schedule/simulate.py) predicts the same from the speeds of the kernels and of the link, which all ranks
measure simultaneously beforehand. Transfers that can be hidden according to the prediction should be hidden.

Shape letters: S = tokens of the sequence, P = ranks, H = query heads, G = key/value heads, D = head dim.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_lightseq.attention import DistAttention
from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import METHODS, Chooser, Device, Direction, Network, TensorShape
from megatron_lightseq.tools.bench.clock import timed
from megatron_lightseq.tools.ranks import RankContext

TASK = "megatron_lightseq.tools.bench.overlap:answer"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LINK_BYTES = 4 * 2**20
"""Size of the message that measures the rate of the link, similar to a chunk of thousands of tokens."""
_PINGS = 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OverlapJob:
    """What the ranks measure."""

    methods: tuple[str, ...]
    seq_length: int = 8192
    num_heads: int = 4
    num_query_groups: int = 4
    head_dim: int = 64
    precision: str = "fp32"
    """fp32 or bf16."""
    repetitions: int = 5

    def layout_of(self, method: str) -> str:
        """The default layout of a method."""
        return METHODS[method].default_layout

    def check(self, ranks: int) -> None:
        """Raise a :class:`LightSeqError` if the job cannot run on ``ranks`` ranks."""
        known = [name for name, method in METHODS.items() if not method.full_rows]
        unknown = [name for name in self.methods if name not in known]
        if unknown or ranks < 2 or self.num_heads % max(1, self.num_query_groups):
            raise ConfigError(
                explain(
                    got=f"methods {', '.join(self.methods)} on {ranks} ranks, {self.num_heads} heads in "
                    f"{self.num_query_groups} groups",
                    rule="at least 2 ranks are needed, groups divide heads, and the methods are "
                    f"{', '.join(known)}",
                    remedy="Correct the flag",
                )
            )
        for method in self.methods:
            SequenceLayout(self.layout_of(method), ranks).check_length(self.seq_length)

    def to_json(self) -> str:
        """The request for :func:`answer`."""
        return json.dumps(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """Speeds that a rank measured on its machine."""

    forward_flops_per_s: float
    backward_flops_per_s: float
    link_bytes_per_s: float
    """In each direction, while sending and receiving simultaneously."""
    link_latency_s: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MethodTiming:
    """One method on one rank: medians over the repetitions."""

    method: str
    overlap: bool
    seconds: float
    """Forward plus backward."""
    exposed_seconds: float
    """How long the host waited for transfers."""
    bytes_sent: int


def answer(request: str, context: RankContext) -> dict[str, Any]:
    """The task for :func:`tools.ranks.run_task`: takes an :class:`OverlapJob`, returns ``speeds`` and ``timings``."""
    fields = json.loads(request)
    job = OverlapJob(**{**fields, "methods": tuple(fields["methods"])})
    torch.set_num_threads(1)
    context.pin()
    context.join()
    inputs = _inputs(job, context.world_size)
    speeds = _measure_speeds(inputs)
    timings = [
        dataclasses.asdict(_measure(job, method, overlap, inputs))
        for method in job.methods
        for overlap in (True, False)
    ]
    return {"speeds": dataclasses.asdict(speeds), "timings": timings}


def _inputs(job: OverlapJob, world_size: int) -> list[torch.Tensor]:
    """q, k, v and dout: (S / P, 1, heads, D)."""
    counts = (job.num_heads, job.num_query_groups, job.num_query_groups, job.num_heads)
    generator = torch.Generator().manual_seed(dist.get_rank())
    shapes = [(job.seq_length // world_size, 1, count, job.head_dim) for count in counts]
    q, k, v, dout = (torch.randn(shape, generator=generator).to(_DTYPES[job.precision]) for shape in shapes)
    return [*(x.requires_grad_() for x in (q, k, v)), dout]


def _measure(job: OverlapJob, method: str, overlap: bool, inputs: Sequence[torch.Tensor]) -> MethodTiming:
    group = dist.group.WORLD
    assert group is not None, "the rank has joined"
    layout = SequenceLayout(job.layout_of(method), group.size())
    attention = DistAttention(group, layout=layout, method=method, overlap=overlap)
    q, k, v, dout = inputs

    def step() -> None:
        attention(q, k, v).backward(dout)

    seconds, exposed = [], []
    for _ in range(job.repetitions + 1):
        attention.stats.reset()
        seconds.append(_timed(step))
        exposed.append(attention.stats.exposed_seconds)
    return MethodTiming(
        method=method,
        overlap=overlap,
        seconds=statistics.median(seconds[1:]),
        exposed_seconds=statistics.median(exposed[1:]),
        bytes_sent=attention.stats.bytes_sent,
    )


def _timed(call: Callable[[], None]) -> float:
    """Duration of a call in seconds, started when all ranks are ready."""
    dist.barrier()
    return timed(call)


def _measure_speeds(inputs: Sequence[torch.Tensor]) -> Speeds:
    """Speed of kernels on this rank's shard and of the link to its neighbours, on all ranks simultaneously."""
    q, k, v, dout = inputs
    alone = DistAttention(mask=Mask.full())
    tokens, batch, heads, dim = q.shape
    products = 4.0 * tokens * tokens * batch * heads * dim  # two products, two operations each
    forward, both = [], []
    for _ in range(3):
        forward.append(_timed(lambda: _forward_only(alone, q, k, v)))
        both.append(_timed(lambda: alone(q, k, v).backward(dout)))
    forward_s = min(forward)
    return Speeds(
        forward_flops_per_s=products / forward_s,
        backward_flops_per_s=2.5 * products / max(min(both) - forward_s, 1e-9),
        link_bytes_per_s=_LINK_BYTES / min(_timed(lambda: _shift(_LINK_BYTES)) for _ in range(5)),
        link_latency_s=statistics.median(_timed(lambda: _shift(1)) for _ in range(_PINGS)),
    )


def _forward_only(attention: DistAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    with torch.no_grad():
        attention(q, k, v)


def _shift(num_bytes: int) -> None:
    """Every rank sends to the next rank and receives from the previous one."""
    rank, size = dist.get_rank(), dist.get_world_size()
    out, into = torch.ones(num_bytes, dtype=torch.uint8), torch.empty(num_bytes, dtype=torch.uint8)
    works = [dist.irecv(into, (rank - 1) % size), dist.isend(out, (rank + 1) % size)]
    for work in works:
        if work is not None:
            work.wait()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """The simulator's prediction for one method, forward plus backward."""

    seconds: float
    exposed_seconds: float


def expect(job: OverlapJob, method: str, world_size: int, speeds: Speeds, *, overlap: bool) -> Expected:
    """Simulate a method with the measured speeds."""
    chooser = Chooser(
        world_size,
        job.seq_length,
        device=Device(
            name="measured",
            forward_flops_per_s=speeds.forward_flops_per_s,
            backward_flops_per_s=speeds.backward_flops_per_s,
        ),
        overlap=overlap,
    )
    network = Network(
        name="measured", link_bytes_per_s=speeds.link_bytes_per_s, link_latency_s=speeds.link_latency_s
    )
    shape = TensorShape(
        num_heads=job.num_heads,
        num_query_groups=job.num_query_groups,
        head_dim=job.head_dim,
        element_bytes=_DTYPES[job.precision].itemsize,
    )
    found = [
        chooser.predict(method, job.layout_of(method), direction, shape, network) for direction in Direction
    ]
    return Expected(
        seconds=sum(one.seconds for one in found), exposed_seconds=sum(one.exposed_s for one in found)
    )
