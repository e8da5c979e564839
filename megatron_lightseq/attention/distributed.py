"""Distributed attention: local shards in, local shard out.

Shape letters: S = local tokens, B = batch, H = query heads, G = key/value heads (query groups), D = head dim of
queries and keys, Dv = head dim of values.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from typing import Any

import torch
from torch import Tensor

from megatron_lightseq.attention.autograd import AttentionFunction
from megatron_lightseq.attention.head_exchange import HeadExchange, HeadRun, UlyssesGroups
from megatron_lightseq.attention.inputs import Inputs, check_sink
from megatron_lightseq.attention.plan import Plan, Run, TileRun
from megatron_lightseq.attention.ring_self_attention import RowRun
from megatron_lightseq.attention.runtime import BoundProgram, Runtime
from megatron_lightseq.attention.stats import AttentionStats
from megatron_lightseq.errors import ConfigError, LayoutError, TransportError, UnsupportedError, explain
from megatron_lightseq.kernels.registry import Kernel, resolve_kernel
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import (
    Direction,
    Method,
    Network,
    Schedule,
    TensorShape,
    build,
    compile_program,
    rank_methods,
    resolve_method,
)
from megatron_lightseq.schedule.heads import HeadCut
from megatron_lightseq.transport import SubTransport, connect
from megatron_lightseq.transport.group import Group, rank_in, size_of


def dist_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group | None = None,
    layout: str | SequenceLayout = "contiguous",
    method: str | Method = "lightseq",
    mask: Mask | None = None,
    softmax_scale: float | None = None,
    kernel: str | Kernel = "auto",
    overlap: bool = True,
) -> Tensor:
    """Attention over a sequence that is cut over the ranks of ``group`` (DistFlashAttn, arXiv 2310.03294).

    Every rank of the group calls it with its own shards. The first call of a kind compares a fingerprint of the
    whole plan across ranks, so that ranks that disagree stop with a message instead of a wrong result. Shapes may
    change from call to call, on all ranks together: a rank that comes alone with a new shape waits for the others
    until the group's timeout.

    Args:
        q: (S, B, H, D), this rank's queries. fp32 or bf16; fp64 with the reference kernel.
        k: (S, B, G, D), keys; G divides H.
        v: (S, B, G, Dv), values.
        group: torch ProcessGroup of the context-parallel ranks; None for one rank.
        layout: how the shards given were cut: ``contiguous``, ``zigzag``, ``striped`` or a SequenceLayout.
        method: ``lightseq``, ``ring``, ``zigzag``, ``all_gather``, ``mesh`` (``mesh:4x2``), ``ulysses``, ``usp``
            (``usp:4``), ``rsa``, a :class:`schedule.Method`, or ``auto``: for each direction, what the simulation
            of a cluster (schedule/choose.py) finds the fastest for these shards.
        mask: default causal.
        softmax_scale: positive; default 1 / sqrt(D).
        kernel: ``auto``, ``cpu`` or ``reference``.
        overlap: transfer while computing.

    Returns:
        (S, B, H, Dv), q's dtype, differentiable in q, k and v.

    Raises:
        ConfigError: shapes, dtypes or devices do not fit together.
        UnsupportedError: an unknown method or kernel, or one that does not take these inputs.
        TransportError: the ranks disagree, or a peer was lost.
    """
    if group is None:
        attention = DistAttention(
            None, layout=layout, method=method, mask=mask, kernel=kernel, overlap=overlap
        )
    else:
        memo = _MEMO.setdefault(group, {})
        key = (layout, method, mask, kernel, overlap)
        if key not in memo:
            memo[key] = DistAttention(
                group, layout=layout, method=method, mask=mask, kernel=kernel, overlap=overlap
            )
        attention = memo[key]
    return attention(q, k, v, softmax_scale)


class DistAttention:
    """Attention of one kind over one group, with what it has learned: plans, buffers and counts.

    :func:`dist_attention` keeps one a group and kind of call; a module of a model owns its own.
    """

    def __init__(
        self,
        group: Group | None = None,
        *,
        layout: str | SequenceLayout = "contiguous",
        method: str | Method = "lightseq",
        mask: Mask | None = None,
        kernel: str | Kernel = "auto",
        overlap: bool = True,
        stats: AttentionStats | None = None,
        network: Network | None = None,
    ) -> None:
        """Arguments as :func:`dist_attention`; ``stats`` is where to count, default a fresh one.

        ``network`` is what ``auto`` predicts with: default NVLink within nodes of 8 and 100 Gbps between them.
        """
        size = size_of(group)
        self.layout = SequenceLayout(layout, size) if isinstance(layout, str) else layout
        if self.layout.cp_size != size:
            raise LayoutError(
                explain(
                    got=f"layout {self.layout} over a group of {size} ranks",
                    rule="a layout cuts for as many ranks as the group has",
                    remedy="Build the layout with the group's size",
                )
            )
        self.method = None if method == "auto" else resolve_method(method)
        """None: chosen when shapes are known."""
        self.network = network
        if self.method is not None:
            self.method.check_layout(self.layout)
        self.mask = Mask.causal() if mask is None else mask
        self.rank = rank_in(group)
        self.stats = AttentionStats() if stats is None else stats
        if (
            self.method is not None
            and self.method.full_rows
            and not (isinstance(kernel, str) and kernel in ("auto", "reference"))
        ):
            raise UnsupportedError(
                explain(
                    got=f"method {self.method.name!r} with kernel {kernel!r}",
                    rule="full rows of scores are computed without a kernel of ours",
                    remedy="Leave kernel='auto', or choose method='ring'",
                )
            )
        self._kernel = kernel
        transport = connect(group) if group is not None and size > 1 else None
        self._runtime = Runtime(transport=transport, overlap=overlap, stats=self.stats)
        self._plans: dict[Inputs, Plan] = {}
        self._scales: set[float] = set()
        """Softmax scales that all ranks have agreed on."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, sink: Tensor | None = None
    ) -> Tensor:
        """The local output (S, B, H, Dv); shapes as in :func:`dist_attention`.

        ``sink`` (H,) is one more logit in every row of a head, of a key whose value is zero; differentiable.
        """
        return self.forward_with_lse(q, k, v, softmax_scale, sink)[0]

    def forward_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, sink: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The local output (S, B, H, Dv) and log-sum-exp (B, H, S; accumulator dtype, not differentiable)."""
        plan = self._plan_for(q, k, v)
        check_sink(sink, q)
        out, lse = AttentionFunction.apply(q, k, v, sink, None, plan, self._scale(softmax_scale, q))
        return out, lse

    def reattach(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: tuple[Tensor, Tensor],
        softmax_scale: float | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """A result that was kept, with a backward: the forward and its communication are not repeated.

        Args:
            q, k, v: recomputed inputs, equal to those that gave the result.
            kept: (S, B, H, Dv) and (B, H, S), what :meth:`forward_with_lse` returned for them.
            softmax_scale, sink: as they were then.
        """
        plan = self._plan_for(q, k, v)
        attached, _ = AttentionFunction.apply(q, k, v, sink, kept, plan, self._scale(softmax_scale, q))
        return attached

    @torch.compiler.disable
    def _scale(self, given: float | None, q: Tensor) -> float:
        """What scores are multiplied by; ranks compare one that is new here."""
        scale = float(q.shape[-1] ** -0.5 if given is None else given)
        if scale in self._scales:
            return scale
        if not 0 < scale < math.inf:
            raise ConfigError(
                explain(
                    got=f"softmax_scale {scale}",
                    rule="scores are multiplied by a positive, finite number",
                    remedy="Leave it out for 1 / sqrt(D), or negate q",
                )
            )
        self._agree(f"softmax scale {scale!r}", f"softmax scale {scale}")
        self._scales.add(scale)
        return scale

    @torch.compiler.disable
    def _plan_for(self, q: Tensor, k: Tensor, v: Tensor) -> Plan:
        inputs = Inputs.of(q, k, v)
        if inputs not in self._plans:
            self._plans[inputs] = self._make_plan(inputs, resolve_kernel(self._kernel, q, k, v))
            if len(self._plans) > _MAX_PLANS:  # the same one on every rank: all make their plans in one order
                del self._plans[next(iter(self._plans))]
        return self._plans[inputs]

    def _make_plan(self, inputs: Inputs, kernel: Kernel) -> Plan:
        seq_length = inputs.q_shape[0] * self.layout.cp_size
        methods = self._methods(inputs, seq_length)
        schedules = {
            direction: build(method, self.layout, mask=self.mask, direction=direction, seq_length=seq_length)
            for direction, method in methods.items()
        }
        exchanges = [method.ulysses_size(self.layout.cp_size) for method in methods.values()]
        texts = [*map(str, schedules.values()), f"heads over {exchanges}", kernel.name, inputs.describe()]
        self._agree("\n".join(texts), inputs.describe())
        runs = {
            direction: self._make_run(method, schedules[direction], inputs, kernel)
            for direction, method in methods.items()
        }
        return Plan(runs[Direction.FORWARD], runs[Direction.BACKWARD], self.stats)

    def _methods(self, inputs: Inputs, seq_length: int) -> dict[Direction, Method]:
        """The method of each direction: the one given, or with ``auto`` the two predicted to be the fastest."""
        if self.method is not None:
            return dict.fromkeys(Direction, self.method)
        shape = TensorShape(
            batch=inputs.q_shape[1],
            num_heads=inputs.q_shape[2],
            num_query_groups=inputs.k_shape[2],
            head_dim=inputs.q_shape[3],
            v_head_dim=inputs.v_shape[3],
            element_bytes=inputs.dtype.itemsize,
        )
        best, *_ = rank_methods(
            self.layout.cp_size,
            shape,
            seq_length,
            mask=self.mask,
            network=self.network,
            layouts=[self.layout.name],
        )
        return {
            prediction.direction: resolve_method(prediction.method)
            for prediction in (best.forward, best.backward)
        }

    def _make_run(self, method: Method, schedule: Schedule, inputs: Inputs, kernel: Kernel) -> Run:
        exchanged = method.ulysses_size(self.layout.cp_size)
        groups = UlyssesGroups.of(self.layout, exchanged, self.rank)
        runtime = self._runtime
        if exchanged > 1 and runtime.transport is not None:
            ring = SubTransport(runtime.transport, groups.ring) if len(groups.ring) > 1 else None
            runtime = Runtime(transport=ring, overlap=runtime.overlap, stats=self.stats)
        ring_rank = groups.ring.index(self.rank)
        program = BoundProgram.bind(compile_program(schedule, ring_rank), inputs.device)
        if method.full_rows:
            rings = build(method, self.layout, mask=self.mask, seq_length=schedule.seq_length)
            return RowRun(
                BoundProgram.bind(compile_program(rings, self.rank), inputs.device), program, runtime
            )
        if exchanged == 1 or self._runtime.transport is None:
            return TileRun(program, kernel, runtime)
        cut = HeadCut(inputs.q_shape[2], inputs.k_shape[2], exchanged)
        exchange = HeadExchange(
            SubTransport(self._runtime.transport, groups.ulysses),
            groups.ulysses,
            self.layout,
            cut,
            self.stats,
        )
        parts = not cut.groups_are_disjoint
        return HeadRun(exchange, TileRun(program, kernel, runtime, gradients_are_parts=parts))

    @property
    def _method_name(self) -> str:
        return "auto" if self.method is None else self.method.name

    def _agree(self, plan_text: str, shown: str) -> None:
        """Raise :class:`TransportError` unless every rank is about to run the same plan."""
        if self._runtime.transport is None:
            return
        digest = hashlib.sha256(plan_text.encode()).digest()
        everyone = self._runtime.transport.gather_digests(digest)
        others = [rank for rank, other in enumerate(everyone) if other != digest]
        if others:
            raise TransportError(
                explain(
                    got=f"rank {self.rank} plans {self._method_name} on {self.layout}, {self.mask} mask, "
                    f"{shown} (plan {digest.hex()[:12]}); rank(s) {others} plan something else",
                    rule="all ranks of a group run one schedule on equally shaped inputs",
                    remedy="Compare method, layout, mask, kernel, shapes, scale and package version of these ranks",
                )
            )


_MAX_PLANS = 64
"""Plans that one attention keeps, the newest ones: a plan is made once for every shape of inputs."""

_MEMO: weakref.WeakKeyDictionary[Any, dict[Any, DistAttention]] = weakref.WeakKeyDictionary()
"""What :func:`dist_attention` remembers of a group; gone with the group."""
