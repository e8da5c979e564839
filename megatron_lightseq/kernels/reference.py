"""Naive attention: the oracle of every kernel and schedule. Short, obvious, any device, fp64-capable, O(Sq Sk).

Shape letters: Q = query tokens, K = key tokens, B = batch, H = query heads, G = key/value heads,
R = H / G query heads that share a key/value head, D = head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lightseq.kernels.merge import merge_into
from megatron_lightseq.kernels.registry import accumulator_dtype, refusal_of
from megatron_lightseq.kernels.specs import KERNELS
from megatron_lightseq.kernels.tile_mask import TileMask


class ReferenceKernel:
    """Attention written as in a textbook, in the accumulator dtype."""

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
    ) -> None:
        """Write one tile into ``(out, lse)``, or merge it there. Shapes as in :class:`~.registry.Kernel`."""
        scores_BGRQK = _scores(q, k, mask, softmax_scale)
        lse_BGRQ = scores_BGRQK.logsumexp(-1)
        weights = _probabilities(scores_BGRQK, lse_BGRQ)
        out_QBHD = torch.einsum("bgrqk,kbgd->qbgrd", weights, v.to(weights.dtype)).flatten(2, 3)
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
    ) -> None:
        """Add the tile's gradients to ``dq, dk, dv``, or write them there. Shapes as in :class:`~.registry.Kernel`."""
        groups, acc = k.shape[2], accumulator_dtype(q.dtype)
        q_grouped, dout_grouped = _grouped(q, groups), _grouped(dout, groups)
        weights = _probabilities(_scores(q, k, mask, softmax_scale), lse.unflatten(1, (groups, -1)))
        dweights = torch.einsum("qbgrd,kbgd->bgrqk", dout_grouped, v.to(acc))
        dscores = weights * (dweights - delta.unflatten(1, (groups, -1)).unsqueeze(-1)) * softmax_scale
        gradients = (
            torch.einsum("bgrqk,kbgd->qbgrd", dscores, k.to(acc)).flatten(2, 3),
            torch.einsum("bgrqk,qbgrd->kbgd", dscores, q_grouped),
            torch.einsum("bgrqk,qbgrd->kbgd", weights, dout_grouped),
        )
        for target, gradient in zip((dq, dk, dv), gradients, strict=True):
            target.add_(gradient) if accumulate else target.copy_(gradient)


def _grouped(x_QBHD: Tensor, groups: int) -> Tensor:
    """(Q, B, H, D) -> (Q, B, G, R, D) in the accumulator dtype."""
    return x_QBHD.to(accumulator_dtype(x_QBHD.dtype)).unflatten(2, (groups, -1))


def _scores(q: Tensor, k: Tensor, mask: TileMask, softmax_scale: float) -> Tensor:
    """Scaled scores (B, G, R, Q, K), -inf where masked."""
    acc = accumulator_dtype(q.dtype)
    scores = torch.einsum("qbgrd,kbgd->bgrqk", _grouped(q, k.shape[2]), k.to(acc)) * softmax_scale
    return scores.masked_fill(~visible(mask, q.shape[0], k.shape[0], q.device), float("-inf"))


def visible(mask: TileMask, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """The tile's mask as a dense boolean (Q, K): True where query may see key."""
    i = torch.arange(num_queries, device=device)[:, None]
    j = torch.arange(num_keys, device=device)[None, :]
    seen = (j - i >= mask.band_lo) & (j - i <= mask.band_hi)
    if mask.key_ranges is not None:
        seen &= (j >= mask.key_ranges[0][:, None]) & (j < mask.key_ranges[1][:, None])
    return seen


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), and 0 in rows that see no key at all (lse = -inf)."""
    return torch.where(lse.isneginf().unsqueeze(-1), 0.0, (scores - lse.unsqueeze(-1)).exp())
