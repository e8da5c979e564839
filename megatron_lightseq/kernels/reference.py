"""Naive attention: the reference for every kernel and schedule. Any device, up to fp64, O(Sq Sk) memory.

Shape letters: Q = query tokens, K = key tokens, B = batch, H = query heads, G = key/value heads,
R = H / G query heads that share a key/value head, D = head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_lightseq.kernels.merge import merge_into
from megatron_lightseq.kernels.registry import accumulator_dtype, refusal_of
from megatron_lightseq.kernels.specs import KERNELS
from megatron_lightseq.kernels.tile_mask import TileMask


class ReferenceKernel:
    """Textbook attention, computed in the accumulator dtype."""

    spec = KERNELS["reference"]
    name = spec.name
    rounds_results = True

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why this kernel cannot take these inputs, or None."""
        return refusal_of(self.spec, q, k, v)

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
        """Merge one tile into ``(out, lse)``, or overwrite them. Shapes as in :class:`~.registry.Kernel`."""
        seen = visible(mask, q.shape[0], k.shape[0], q.device)
        scores_BGRQK = _scores(q, k, seen, softmax_scale, softcap)
        lse_BGRQ = scores_BGRQK.logsumexp(-1)
        weights = _probabilities(scores_BGRQK, lse_BGRQ, seen)
        out_QBHD = sum_over_seen("bgrqk,kbgd->qbgrd", weights, v.to(weights.dtype), seen).flatten(2, 3)
        lse_BHQ = lse_BGRQ.flatten(1, 2)
        if accumulate:
            merge_into(out, lse, out_QBHD, lse_BHQ)
        else:
            out.copy_(out_QBHD)
            lse.copy_(lse_BHQ)

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
        """Add the tile's gradients to ``dq, dk, dv``, or overwrite them. Shapes as in :class:`~.registry.Kernel`."""
        groups, acc = k.shape[2], accumulator_dtype(q.dtype)
        q_grouped, dout_grouped = _grouped(q, groups), _grouped(dout, groups)
        seen = visible(mask, q.shape[0], k.shape[0], q.device)
        scores = _scores(q, k, seen, softmax_scale, softcap)
        weights = _probabilities(scores, lse.unflatten(1, (groups, -1)), seen)
        dweights = torch.einsum("qbgrd,kbgd->bgrqk", dout_grouped, v.to(acc))
        dscores = weights * (dweights - delta.unflatten(1, (groups, -1)).unsqueeze(-1)) * softmax_scale
        if softcap:
            dscores = dscores * (
                1 - (scores / softcap).square()
            )  # the derivative of softcap * tanh(score / softcap)
        dscores = dscores.masked_fill(~seen, 0.0)  # dweights may not be finite there
        gradients = (
            sum_over_seen("bgrqk,kbgd->qbgrd", dscores, k.to(acc), seen).flatten(2, 3),
            sum_over_seen("bgrqk,qbgrd->kbgd", dscores, q_grouped, seen),
            sum_over_seen("bgrqk,qbgrd->kbgd", weights, dout_grouped, seen),
        )
        for target, gradient in zip((dq, dk, dv), gradients, strict=True):
            target.add_(gradient) if accumulate else target.copy_(gradient)


def _grouped(x_QBHD: Tensor, groups: int) -> Tensor:
    """(Q, B, H, D) -> (Q, B, G, R, D) in the accumulator dtype."""
    return x_QBHD.to(accumulator_dtype(x_QBHD.dtype)).unflatten(2, (groups, -1))


def _scores(q: Tensor, k: Tensor, seen: Tensor, softmax_scale: float, softcap: float) -> Tensor:
    """Scaled scores (B, G, R, Q, K), bounded by the softcap unless it is 0, -inf where masked."""
    acc = accumulator_dtype(q.dtype)
    scores = torch.einsum("qbgrd,kbgd->bgrqk", _grouped(q, k.shape[2]), k.to(acc)) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, float("-inf"))


def visible(mask: TileMask, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """The tile's mask as a dense boolean (Q, K): True where the query may see the key."""
    i = torch.arange(num_queries, device=device)[:, None]
    j = torch.arange(num_keys, device=device)[None, :]
    seen = (j - i >= mask.band_lo) & (j - i <= mask.band_hi)
    if mask.key_ranges is not None:
        seen &= (j >= mask.key_ranges[0][:, None]) & (j < mask.key_ranges[1][:, None])
    return seen


def _probabilities(scores: Tensor, lse: Tensor, seen: Tensor) -> Tensor:
    """exp(scores - lse); 0 where masked, even if lse is NaN, and in rows that see no key (lse = -inf)."""
    return torch.where(seen & ~lse.isneginf().unsqueeze(-1), (scores - lse.unsqueeze(-1)).exp(), 0.0)


def sum_over_seen(equation: str, weights: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """einsum of ``weights`` (B, G, R, Q, K) and ``x``, in which masked pairs contribute nothing.

    Their weight is 0, but 0 times infinity or NaN is NaN. So values of ``x`` that are not finite are left out of the
    product, and added to the sums of the rows or keys that see them.
    """
    finite = x.isfinite()
    if finite.all():
        return torch.einsum(equation, weights, x)
    total = torch.einsum(equation, weights, torch.where(finite, x, 0.0))
    for value in (float("inf"), float("-inf"), float("nan")):
        where = x.isnan() if math.isnan(value) else x == value
        count = torch.einsum(equation, seen.to(x.dtype).expand_as(weights), where.to(x.dtype))
        total += torch.where(count > 0, value, 0.0)
    return total
