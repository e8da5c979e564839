"""Keeps attention results across activation recomputation.

Activation recomputation runs a layer's forward twice: once without a graph, and again, with one, when backward
gets there. Attention is the one part not worth repeating: its output and log-sum-exp are small next to the time
they took, and with context parallelism its communication would be repeated as well. So the first run leaves
(out, lse) here, and the second picks them up (DistFlashAttn, section 3.3, rematerialisation-aware
checkpointing; the public surface for Megatron is ``keep_attention_on_recompute``).
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

from megatron_lightseq.errors import LightSeqError, explain


class AttentionStash:
    """First in, first out, for one module: what ran first is recomputed first.

    One stash serves one stretch of recomputation (``megatron.checkpoint_scope`` makes one a checkpoint), so that
    the order in which micro-batches reach backward does not matter.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[Tensor, Tensor]] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def push(self, out: Tensor, lse: Tensor) -> None:
        """Keep a forward's result: out (S, B, H, Dv) and lse (B, H, S). Gradients do not flow through it."""
        self._kept.append((out.detach(), lse.detach()))

    def pop(self, q_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The oldest result kept.

        Args:
            q_shape: shape (S, B, H, D) of the queries now being recomputed.

        Raises:
            LightSeqError: nothing is kept, or what is kept belongs to queries of another shape: forwards and
                recomputations went out of step.
        """
        kept = tuple(self._kept[0][0].shape) if self._kept else None
        if kept is None or kept[:3] != tuple(q_shape[:3]):
            raise LightSeqError(
                explain(
                    got=f"recomputing attention for queries {tuple(q_shape)}, the oldest kept output is {kept}",
                    rule="every recomputation follows one forward of the same shape, in the same order",
                    remedy="Recompute what was run, in that order, or train with --no-keep-attention-on-recompute",
                )
            )
        return self._kept.popleft()

    def clear(self) -> None:
        """Forget everything, as at the start of a step."""
        self._kept.clear()
