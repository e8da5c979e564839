"""Merges partial attention results over disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lightseq.kernels.extension import missing_extension


def merge_into(out: Tensor, lse: Tensor, out_new: Tensor, lse_new: Tensor) -> None:
    """Merge a normalised partial result into another, in place (online softmax; exact if one of them is empty).

    Args:
        out: (S, B, H, Dv), accumulator dtype; updated.
        lse: (B, H, S), log-sum-exp of the scores that ``out`` is normalised by, -inf for no keys; updated.
        out_new: like ``out``.
        lse_new: like ``lse``.
    """
    if _is_fusible(out) and _is_fusible(out_new) and lse.dtype == torch.float32:
        torch.ops.mls.merge_partials(out, lse, out_new, lse_new)
        return
    total = torch.logaddexp(lse, lse_new)
    weight = torch.where(lse_new.isneginf(), 0.0, (lse_new - total).exp())
    out.lerp_(out_new, weight.permute(2, 0, 1).unsqueeze(-1).to(out.dtype))
    lse.copy_(total)


def _is_fusible(x: Tensor) -> bool:
    """Whether the compiled kernel takes a partial output."""
    contiguous = x.shape[-1] == 1 or x.stride(-1) == 1
    fp32_on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    return contiguous and fp32_on_cpu and missing_extension() is None


def merge_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add an attention sink to a complete result: one more logit in every row, of a key whose value is zero.

    The backward for q, k and v is unchanged, if it is given the returned ``out`` and ``lse``.

    Args:
        out: (S, B, H, Dv).
        lse: (B, H, S), -inf where a row sees no key.
        sink: (H,), the logit of each head.

    Returns:
        The new (out, lse), of the same shapes; ``out`` keeps its dtype.
    """
    merged = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
    kept = (lse - merged).exp()  # 0 where lse is -inf: such a row sees only the sink
    return (out * kept.permute(2, 0, 1).unsqueeze(-1)).to(out.dtype), merged
