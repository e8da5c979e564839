"""Distributed attention: local shards in, local shard out.

Shape letters: S = local tokens, B = batch, H = query heads, G = key/value heads (query groups), D = head dim of
queries and keys, Dv = head dim of values.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lightseq.attention.agreement import Agreement
from megatron_lightseq.attention.autograd import AttentionFunction, LearnedScale
from megatron_lightseq.attention.inputs import (
    Inputs,
    MaskArgument,
    Masks,
    autocast_inputs,
    check_sink,
    check_softcap,
    masks_of,
)
from megatron_lightseq.attention.plan import Plan
from megatron_lightseq.attention.planner import Planner
from megatron_lightseq.attention.runtime import Runtime
from megatron_lightseq.attention.stats import AttentionStats
from megatron_lightseq.errors import ConfigError, LayoutError, UnsupportedError, explain
from megatron_lightseq.kernels.registry import Kernel, resolve_kernel
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Direction, Method, Network, SchedulePair, resolve_method
from megatron_lightseq.transport import connect, pool_of
from megatron_lightseq.transport.group import Group, rank_in, size_of

MethodArgument = str | Method | tuple[str | Method, str | Method]
"""A method, ``auto``, or a pair: the method of the forward pass and that of the backward pass."""


def dist_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group | None = None,
    layout: str | SequenceLayout = "contiguous",
    method: MethodArgument = "lightseq",
    mask: MaskArgument | None = None,
    softmax_scale: float | Tensor | None = None,
    kernel: str | Kernel = "auto",
    overlap: bool = True,
    invariant_chunk: int | None = None,
    softcap: float | None = None,
    verify_transport: bool = False,
) -> Tensor:
    """Attention over a sequence that is cut over the ranks of ``group`` (DistFlashAttn, arXiv 2310.03294).

    Collective: every rank of the group calls it with its own shards, and every rank calls backward on the result,
    in the same order as the other ranks. A rank that skips a call leaves its peers waiting until the group's
    timeout, when they raise :class:`TransportError` (over NCCL, torch's watchdog ends the process). A rank whose loss
    does not depend on its output gives it a zero gradient instead of skipping its backward.

    The first call with new settings or shapes compares the whole plan across ranks, and ranks that disagree stop with
    a message. Shapes may change from call to call, on all ranks together.

    Args:
        q: (S, B, H, D), this rank's queries; fp32, bf16, fp16 or fp64, if the kernel supports it.
        k: (S, B, G, D), this rank's keys, q's dtype; G divides H.
        v: (S, B, G, Dv), this rank's values, q's dtype.
        group: torch ProcessGroup of the context-parallel ranks; None for one rank.
        layout: how the shards were cut: a name in ``layout.LAYOUTS`` or a SequenceLayout.
        method: a name in ``schedule.METHODS``, with sizes if it takes any (``usp:4``), a :class:`schedule.Method`, or
            a pair of these for forward and backward; ``schedule.method_forms()`` lists the names. ``auto``: in each
            direction, the one predicted to be the fastest (schedule/choose.py).
        mask: which keys a query may see; default causal. A sequence of masks is one for each row of the batch, as where
            each row packs other documents; the work of all rows is then balanced together.
        softmax_scale: factor of the scores, positive; default 1 / sqrt(D). A tensor of one element may be learned: it
            gets the gradient that comes from the local queries, to be summed over the ranks. Its value is read by the
            host, and must be the same on all ranks.
        kernel: one of ``kernels.specs.kernel_names()``, or a Kernel; ``auto`` is the first that supports the inputs.
        overlap: transfer data for the next step while computing the present one.
        invariant_chunk: tokens per chunk of a grid over the sequence that fixes the order of all sums
            (schedule/joins.py). Outputs and gradients are then bit for bit the same for every number of ranks, layout
            and method whose parts are whole chunks, one rank included. None: sums follow the schedule.
        softcap: c in c * tanh(score / c), which bounds the scaled scores (Gemma 2); None: scores as they are.
        verify_transport: send a checksum with every message and compare it on arrival (transport/checked.py).

    Under ``torch.autocast``, q, k and v are cast to its dtype first, as in torch's scaled_dot_product_attention.

    Returns:
        (S, B, H, Dv), q's dtype, differentiable in q, k, v and softmax_scale.

    Raises:
        ConfigError: shapes, dtypes or devices do not fit together.
        LayoutError: the layout is not for this group, or the sequence does not divide among the ranks.
        UnsupportedError: an unknown method or kernel, or one that does not take these inputs.
        TransportError: the ranks disagree, a peer was lost or did not make the same calls, or, with verify_transport, a
            message was changed on its way.
    """
    settings: dict[str, Any] = {"layout": layout, "method": method, "kernel": kernel, "overlap": overlap}
    settings |= {"invariant_chunk": invariant_chunk, "softcap": softcap}
    settings["verify_transport"] = verify_transport
    if group is None:
        return DistAttention(None, **settings)(q, k, v, softmax_scale, mask=mask)
    known = _ATTENTIONS.setdefault(group, {})
    key = tuple(settings.values())
    if key not in known:
        known[key] = DistAttention(group, **settings)
    return known[key](q, k, v, softmax_scale, mask=mask)


class DistAttention:
    """Attention with fixed settings over one group. Keeps execution plans and receive buffers, and counts traffic.

    :func:`dist_attention` keeps one per group and settings; a module of a model owns its own.
    """

    def __init__(
        self,
        group: Group | None = None,
        *,
        layout: str | SequenceLayout = "contiguous",
        method: MethodArgument = "lightseq",
        mask: MaskArgument | None = None,
        kernel: str | Kernel = "auto",
        overlap: bool = True,
        invariant_chunk: int | None = None,
        softcap: float | None = None,
        verify_transport: bool = False,
        stats: AttentionStats | None = None,
        network: Network | None = None,
        schedules: SchedulePair | None = None,
    ) -> None:
        """Arguments as for :func:`dist_attention`, and three more.

        Args:
            stats: where to count; default a new one.
            network: what ``auto`` predicts with, and what placements may look at; default NVLink within nodes of 8 and
                100 Gbps between them.
            schedules: methods, layout, mask and schedules that are already resolved; ``method``, ``layout`` and
                ``mask`` are then ignored.
        """
        if schedules is not None:
            method = (schedules.forward_method, schedules.backward_method)
            layout, mask = schedules.problem.layout, schedules.problem.mask
        size = size_of(group)
        self.layout = SequenceLayout(layout, size) if isinstance(layout, str) else layout
        if self.layout.cp_size != size:
            raise LayoutError(
                explain(
                    got=f"layout {self.layout} over a group of {size} ranks",
                    rule="a layout is for as many ranks as the group has",
                    remedy="Build the layout with the group's size",
                )
            )
        self.stats = AttentionStats() if stats is None else stats
        self.mask: MaskArgument = Mask.causal() if mask is None else mask
        check_softcap(softcap)
        methods = _methods_of(method)
        for given in {} if methods is None else methods.values():
            _check_method(given, self.layout, kernel)
        runtime = Runtime(
            transport=connect(group, verify=verify_transport) if group is not None and size > 1 else None,
            overlap=overlap,
            stats=self.stats,
            buffers=pool_of(group),
        )
        self._agreement = Agreement(runtime.transport, f"{_shown(methods)} on {self.layout}")
        self._planner = Planner(
            rank=rank_in(group),
            layout=self.layout,
            methods=methods,
            network=network,
            schedules=schedules,
            runtime=runtime,
            agreement=self._agreement,
            chunk=_checked_chunk(invariant_chunk, methods),
            softcap=softcap,
        )
        self._kernel, self._softcap = kernel, softcap
        self._plans: OrderedDict[tuple[Inputs, Masks], Plan] = OrderedDict()
        self._unsettled: dict[tuple[Inputs, Masks], Callable[[], None]] = {}
        """Checks of prepared plans that have not been used yet."""
        self._last: tuple[Inputs, Kernel] | None = None
        """Of the last call: its inputs, and the kernel that took them."""
        self._scales: set[float] = set()
        """Softmax scales that all ranks have agreed on."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | Tensor | None = None,
        sink: Tensor | None = None,
        mask: MaskArgument | None = None,
    ) -> Tensor:
        """The local output (S, B, H, Dv); shapes as in :func:`dist_attention`.

        Args:
            q, k, v, softmax_scale: as in :func:`dist_attention`.
            sink: (H,), one more logit in every row of a head, of a key whose value is zero; differentiable.
            mask: for this call alone; default the mask of this object. Another one in every call, as packed batches
                have, costs a plan each and no memory: the newest plans are kept.
        """
        return self.forward_with_lse(q, k, v, softmax_scale, sink, mask)[0]

    @torch.compiler.disable
    def prepare(self, mask: MaskArgument, like: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        """Plan for a mask ahead of the calls that use it, as where the next batch's documents are known.

        All ranks must prepare the same masks in the same order. No rank waits for another: digests of the plans travel
        meanwhile, and are compared when the plan is first used. A call with a prepared mask neither plans nor starts a
        collective. Up to ``MAX_PLANS`` plans are kept, those used last.

        Args:
            mask: of the calls; one, or one for each row of the batch.
            like: q, k and v of which only shapes, dtype and device count; default: those of the last call.

        Raises:
            ConfigError: there was no call yet, and ``like`` is not given; or the mask does not fit.
            LayoutError, UnsupportedError: as for a call.
        """
        last = (
            self._last
            if like is None
            else (Inputs.of(*like), resolve_kernel(self._kernel, *like, self._softcap))
        )
        if last is None:
            raise ConfigError(
                explain(
                    got="prepare() before the first call, without like=",
                    rule="a plan depends on the shapes, the dtype and the device of q, k and v",
                    remedy="Give like=(q, k, v), or prepare behind the first call",
                )
            )
        inputs, kernel = last
        self._keep(inputs, masks_of(mask, inputs.q_shape[1]), kernel)

    def forward_with_lse(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | Tensor | None = None,
        sink: Tensor | None = None,
        mask: MaskArgument | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The local output (S, B, H, Dv) and log-sum-exp (B, H, S; accumulator dtype, not differentiable)."""
        return self._attend(q, k, v, None, softmax_scale, sink, mask)

    def reattach(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: tuple[Tensor, ...],
        softmax_scale: float | Tensor | None = None,
        sink: Tensor | None = None,
        mask: MaskArgument | None = None,
    ) -> Tensor:
        """Give a kept result a backward pass, without repeating the forward pass or its communication.

        Args:
            q, k, v: recomputed inputs, equal to those that gave the result.
            kept: (S, B, H, Dv) and (B, H, S), what :meth:`forward_with_lse` returned for them.
            softmax_scale, sink, mask: as they were then.
        """
        return self._attend(q, k, v, kept, softmax_scale, sink, mask)[0]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: tuple[Tensor, ...] | None,
        softmax_scale: float | Tensor | None,
        sink: Tensor | None,
        mask: MaskArgument | None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = autocast_inputs(q, k, v)
        plan = self._plan_for(q, k, v, mask)
        check_sink(sink, q)
        scale = self._scale(softmax_scale, q)
        if isinstance(softmax_scale, Tensor) and softmax_scale.requires_grad:
            q = LearnedScale.apply(q, softmax_scale, scale)
        out, lse = AttentionFunction.apply(q, k, v, sink, kept, plan, scale)
        return out, lse

    @torch.compiler.disable
    def _scale(self, given: float | Tensor | None, q: Tensor) -> float:
        """Validate the softmax scale; the first time a value is seen, check that all ranks use the same one."""
        if isinstance(given, Tensor) and given.numel() != 1:
            raise ConfigError(
                explain(
                    got=f"softmax_scale of shape {tuple(given.shape)}",
                    rule="all scores are multiplied by one number",
                    remedy="Multiply q by scales per head or dimension, and give softmax_scale=1.0",
                )
            )
        if isinstance(given, Tensor):
            given = given.detach().item()
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
        self._agreement.check(f"softmax scale {scale!r}", f"softmax scale {scale}")
        if len(self._scales) >= MAX_SCALES:  # on all ranks, because they make the same calls
            self._scales.clear()
        self._scales.add(scale)
        return scale

    @torch.compiler.disable
    def _plan_for(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskArgument | None) -> Plan:
        inputs = Inputs.of(q, k, v)
        if self._last is None or self._last[0] != inputs:
            self._last = inputs, resolve_kernel(self._kernel, q, k, v, self._softcap)
        key = self._keep(inputs, masks_of(self.mask if mask is None else mask, q.shape[1]), self._last[1])
        if key in self._unsettled:
            self._unsettled.pop(key)()
        return self._plans[key]

    def _keep(self, inputs: Inputs, mask: Masks, kernel: Kernel) -> tuple[Inputs, Masks]:
        """Make the plan unless it is there, and mark it as the one used last; its key."""
        key = (inputs, mask)
        if key not in self._plans:
            self._plans[key], self._unsettled[key] = self._planner.plan(inputs, mask, kernel)
            if len(self._plans) > MAX_PLANS:  # the same one on all ranks, because they make the same calls
                oldest, _ = self._plans.popitem(last=False)
                self._unsettled.pop(oldest, None)
        self._plans.move_to_end(key)
        return key


def _methods_of(method: MethodArgument) -> dict[Direction, Method] | None:
    """The method of each direction; None for ``auto``."""
    if method == "auto":
        return None
    forward, backward = method if isinstance(method, tuple) else (method, method)
    return {Direction.FORWARD: resolve_method(forward), Direction.BACKWARD: resolve_method(backward)}


def _checked_chunk(chunk: int | None, methods: dict[Direction, Method] | None) -> int | None:
    if chunk is not None and (chunk < 1 or methods is None):
        raise ConfigError(
            explain(
                got=f"invariant_chunk={chunk} with method {_shown(methods)}",
                rule="a grid has chunks of one token or more, and auto may choose methods that cannot follow it",
                remedy="Give a number that divides every rank's shard, such as 1024, and name a method",
            )
        )
    return chunk


def _shown(methods: dict[Direction, Method] | None) -> str:
    return " + ".join(dict.fromkeys(m.name for m in methods.values())) if methods else "auto"


def _check_method(method: Method, layout: SequenceLayout, kernel: str | Kernel) -> None:
    """Raise :class:`UnsupportedError` unless ``method`` can compute on ``layout`` with ``kernel``."""
    method.check_layout(layout)
    if method.full_rows and kernel not in ("auto", "reference"):
        raise UnsupportedError(
            explain(
                got=f"method {method.name!r} with kernel {kernel!r}",
                rule="full rows of scores are computed in plain torch, without a kernel",
                remedy="Leave kernel='auto', or choose method='ring'",
            )
        )


MAX_PLANS = 64
"""Plans that one attention keeps, those used last; one is made for every new shape of inputs and for every new mask.
They must cover the micro-batches in flight: a plan serves their backward and recomputation too."""

MAX_SCALES = 64
"""Softmax scales that one attention remembers as agreed on: a learned one takes a new value in every step."""

_ATTENTIONS: weakref.WeakKeyDictionary[Any, dict[Any, DistAttention]] = weakref.WeakKeyDictionary()
"""What :func:`dist_attention` keeps, by group and settings; dropped with the group."""
