"""Distributed linear attention: local shards in, local shard out.

Shape letters: S = local tokens, B = batch, H = heads, G = heads of k and v, K = head dim of queries and keys, V = head
dim of values.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lightseq.attention.agreement import Agreement
from megatron_lightseq.attention.inputs import MaskArgument, Masks, autocast_inputs, masks_of
from megatron_lightseq.attention.planner import shortened, shown
from megatron_lightseq.attention.runtime import Runtime
from megatron_lightseq.attention.stats import AttentionStats
from megatron_lightseq.kernels.linear.contract import LinearKernel, Part
from megatron_lightseq.kernels.linear.registry import resolve_linear_kernel
from megatron_lightseq.kernels.specs import AUTO
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.linear.autograd import Kept, LinearFunction
from megatron_lightseq.linear.grid import grid_piece, parts_of, pieces_of
from megatron_lightseq.linear.inputs import LinearInputs, checked_scale, checked_scan, contiguous_layout
from megatron_lightseq.linear.plan import LinearPlan
from megatron_lightseq.linear.visible import common_documents, packings_of
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Direction, Network
from megatron_lightseq.schedule.scan import Scan
from megatron_lightseq.schedule.scan_choose import rank_scans
from megatron_lightseq.schedule.scan_place import build_scan
from megatron_lightseq.transport import connect
from megatron_lightseq.transport.group import Group, rank_in, size_of


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one call, as in :func:`dist_linear_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    scale: float | None
    mask: MaskArgument | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The inputs that may have gradients."""
        return self.q, self.k, self.v, self.log_decay, self.beta

    def prepared(self, *, normalize: bool) -> _Call:
        """With the dtypes of autocast; and a column of ones beside the values, which sums up the weights."""
        q, k, v = autocast_inputs(self.q, self.k, self.v)
        LinearInputs.of(q, k, v, self.log_decay, self.beta)  # before anything is done with them
        if normalize:
            v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1)
        return replace(self, q=q, k=k, v=v)


class LinearResult(NamedTuple):
    """The output, and what a recomputed forward pass takes in place of computing it again."""

    out: Tensor
    """(S, B, H, V), in v's dtype; differentiable."""
    kept: Kept
    """For :meth:`DistLinearAttention.reattach`."""


def dist_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    group: Group | None = None,
    layout: str | SequenceLayout = "contiguous",
    mask: MaskArgument | None = None,
    scale: float | None = None,
    normalize: bool = False,
    scan: str = "ring",
    invariant: bool = True,
    kernel: str | LinearKernel = "auto",
    overlap: bool = True,
) -> Tensor:
    """Causal linear attention over a sequence that is cut over the ranks of ``group``.

    A token changes a state S (K x V for each head), and reads its output from it:

        S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_(t-1) + beta_t k_t v_t^T        with beta: the delta rule
        S_t =                        diag(alpha_t) S_(t-1) +        k_t v_t^T        without
        o_t = scale * S_t^T q_t                                                      alpha = exp(log_decay)

    Without gates this is linear attention (arXiv 2006.16236); with ``log_decay`` of heads RetNet, Lightning Attention
    and Mamba-2's SSD, of channels GLA; with ``beta`` DeltaNet, with both gated DeltaNet and Kimi Delta Attention.
    Feature maps and norms of q and k are applied by the caller, before the call. What travels is a state: its size does
    not depend on the sequence's length.

    Collective: as for :func:`megatron_lightseq.dist_attention`.

    Output and input gradients are the same bits for every number of ranks whose shards are whole pieces of a grid that
    depends on the sequence's length alone (linear/grid.py), and for every scan.

    Args:
        q: (S, B, H, K), this rank's queries; fp32, bf16, fp16 or fp64.
        k: (S, B, G, K), this rank's keys, q's dtype.
        v: (S, B, G, V), this rank's values, q's dtype. G divides H; k and v may also have more heads than q, or
            different numbers of them: each divides the largest, H, and a head is shared by adjacent ones.
        log_decay: (S, B, H), or (S, B, H, K) for a decay of each channel; any floating-point dtype. Natural logarithms
            of what is left of a state: finite, and at most 0. None: nothing decays.
        beta: (S, B, H), any floating-point dtype: the strength with which the delta rule writes. None: no delta rule.
        group: torch ProcessGroup of the context-parallel ranks; None for one rank.
        layout: how the shards were cut: contiguous, by name or as a SequenceLayout.
        mask: causal (the default), or causal documents, padded or not; or one mask for each row of the batch.
        scale: positive factor of the output; default K ** -0.5.
        normalize: divide by the sum of the weights scale * (q_i . k_j), as linear attention with positive feature maps
            does.
        scan: how states travel: a name in ``schedule.scan_place.SCANS``, or ``auto`` for the one that is predicted to
            be the fastest. ``ring`` sends the fewest bytes: one state to the next rank.
        invariant: False to let other scans than the ring send one map for a whole shard in place of one for each of
            its pieces: fewer bytes, and bits that depend on the number of ranks and the scan.
        kernel: one of ``kernels.linear.specs.linear_kernel_names()``, or a LinearKernel; ``auto`` is the first that
            supports the inputs.
        overlap: compute what needs no state while states travel.

    Under ``torch.autocast``, q, k and v are cast to its dtype first. States and gates are computed in fp32, or in fp64
    for fp64 inputs.

    Returns:
        (S, B, H, V), v's dtype, differentiable in q, k, v, log_decay and beta.

    Raises:
        ConfigError: shapes, dtypes or devices do not fit together, or the mask is for another length.
        LayoutError: the layout is not for this group.
        UnsupportedError: a mask or layout under which no state is enough, or an unknown or unsuitable kernel.
        TransportError: the ranks disagree, or a peer was lost or did not make the same calls.
    """
    gates: dict[str, Any] = {"log_decay": log_decay, "beta": beta, "mask": mask, "scale": scale}
    settings: dict[str, Any] = {"layout": layout, "normalize": normalize, "scan": scan}
    settings |= {"invariant": invariant, "kernel": kernel, "overlap": overlap}
    if group is None:
        return DistLinearAttention(None, **settings)(q, k, v, **gates)
    known = _ATTENTIONS.setdefault(group, {})
    key = tuple(settings.values())
    if key not in known:
        known[key] = DistLinearAttention(group, **settings)
    return known[key](q, k, v, **gates)


class DistLinearAttention:
    """Linear attention with fixed settings over one group. Keeps plans, and counts traffic.

    :func:`dist_linear_attention` keeps one per group and settings; a module of a model owns its own.
    """

    def __init__(
        self,
        group: Group | None = None,
        *,
        layout: str | SequenceLayout = "contiguous",
        mask: MaskArgument | None = None,
        normalize: bool = False,
        scan: str = "ring",
        invariant: bool = True,
        kernel: str | LinearKernel = "auto",
        overlap: bool = True,
        stats: AttentionStats | None = None,
        network: Network | None = None,
    ) -> None:
        """Arguments as for :func:`dist_linear_attention`, and two more.

        Args:
            stats: where to count; default a new one.
            network: what ``scan="auto"`` predicts with, and what says how many ranks a node has; default NVLink within
                nodes of 8 and 100 Gbps between them.
        """
        size = size_of(group)
        self.layout = contiguous_layout(layout, size)
        self.mask: MaskArgument = Mask.causal() if mask is None else mask
        self.stats = AttentionStats() if stats is None else stats
        self._rank, self._normalize, self._kernel = rank_in(group), normalize, kernel
        self._scan, self._invariant, self._network = checked_scan(scan), invariant, network
        transport = connect(group) if group is not None and size > 1 else None
        self._runtime = Runtime(transport=transport, overlap=overlap, stats=self.stats)
        self._agreement = Agreement(transport, f"linear attention on {self.layout}, scan {scan}")
        self._plans: OrderedDict[Any, LinearPlan] = OrderedDict()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
        mask: MaskArgument | None = None,
    ) -> Tensor:
        """The local output (S, B, H, V); shapes as in :func:`dist_linear_attention`.

        Args:
            q, k, v, log_decay, beta, scale: as in :func:`dist_linear_attention`.
            mask: for this call alone; default the mask of this object.
        """
        return self._attend(_Call(q, k, v, log_decay, beta, scale, mask)).out

    def forward_with_states(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
        mask: MaskArgument | None = None,
    ) -> LinearResult:
        """The output, and with it what :meth:`reattach` takes: all that a recomputed forward needs not to repeat."""
        return self._attend(_Call(q, k, v, log_decay, beta, scale, mask))

    def reattach(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: Kept,
        *,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
        mask: MaskArgument | None = None,
    ) -> Tensor:
        """Give a kept result a backward pass, without repeating the forward pass or its communication.

        Args:
            q, k, v, log_decay, beta: recomputed inputs, equal to those that gave the result.
            kept: of what :meth:`forward_with_states` returned for them, maybe detached.
            scale, mask: as they were then.
        """
        return self._attend(_Call(q, k, v, log_decay, beta, scale, mask), kept).out

    def _attend(self, call: _Call, kept: Kept | None = None) -> LinearResult:
        call = call.prepared(normalize=self._normalize)
        result: Kept = LinearFunction.apply(*call.tensors, kept, self._plan_for(call))
        return LinearResult(_normalised(result[0]) if self._normalize else result[0], result)

    @torch.compiler.disable
    def _plan_for(self, call: _Call) -> LinearPlan:
        inputs = LinearInputs.of(*call.tensors)
        mask = self.mask if call.mask is None else call.mask
        factor, masks = checked_scale(call.scale, call.q.shape[3]), masks_of(mask, call.q.shape[1])
        key = (inputs, masks, factor)
        if key not in self._plans:
            like = Part.of(call.tensors, piece=1, scale=factor, documents=None, heads=inputs.heads)
            self._plans[key] = self._planned(inputs, masks, factor, resolve_linear_kernel(self._kernel, like))
            if len(self._plans) > MAX_PLANS:  # the same one on all ranks, because they make the same calls
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _planned(self, inputs: LinearInputs, masks: Masks, scale: float, kernel: LinearKernel) -> LinearPlan:
        """A new plan, compared with those of the other ranks."""
        seq_length = inputs.q_shape[0] * self.layout.cp_size
        self.layout.check_length(seq_length)
        packings = packings_of(masks, seq_length)
        scans = self._scans(inputs, common_documents(packings), seq_length)
        facts = f"{inputs.describe()}, scale {scale!r}, kernel {kernel.name}"
        texts = [facts, shown(masks), *map(str, scans.values()), f"invariant {self._invariant}"]
        self._agreement.check("\n".join(texts), f"{shortened(shown(masks))} mask, {facts}")
        return LinearPlan.of(
            inputs,
            scale=scale,
            rank=self._rank,
            packings=packings,
            scans=scans,
            kernel=kernel,
            runtime=self._runtime,
            invariant=self._invariant,
        )

    def _scans(self, inputs: LinearInputs, mask: Mask, seq_length: int) -> dict[Direction, Scan]:
        """The scans of both directions, for documents that all rows have in common."""
        method = self._scan
        if method == AUTO:
            pieces = pieces_of(parts_of(inputs.q_shape[0], grid_piece(seq_length)))
            shape = inputs.state_shape(pieces if self._invariant else None)
            method = rank_scans(self.layout, mask, seq_length, shape, self._network)[0][1]
        return {
            direction: build_scan(
                method,
                self.layout,
                mask=mask,
                direction=direction,
                seq_length=seq_length,
                network=self._network,
            )
            for direction in Direction
        }


def _normalised(out: Tensor) -> Tensor:
    """Divided by its last column, the sum of the weights; rows of padding have none, and stay zero."""
    weights = out[..., -1:]
    return out[..., :-1] / torch.where(weights == 0, 1, weights)


MAX_PLANS = 64
"""Plans that one attention keeps, those used last: one for each shape of inputs and each mask."""

_ATTENTIONS: weakref.WeakKeyDictionary[Any, dict[Any, DistLinearAttention]] = weakref.WeakKeyDictionary()
"""What :func:`dist_linear_attention` keeps, by group and settings; dropped with the group."""
