"""Keeps attention results across activation recomputation.

Activation recomputation runs a layer's forward twice: first without a graph, then again with one, when backward
reaches the layer. Attention is the one part that is not worth repeating: its output and log-sum-exp are small
compared with the time they take, and with context parallelism its communication would be repeated as well. So the
first forward leaves (out, lse) here and the second takes them (DistFlashAttn, section 3.3: rematerialisation-aware
checkpointing). The configuration key is ``keep_attention_on_recompute``.
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

from megatron_lightseq.errors import LightSeqError, explain


class AttentionStash:
    """A first-in, first-out queue for one module: what ran first is recomputed first.

    There is one stash per checkpointed region (``megatron.checkpoint_scope`` creates them), so the order in which
    micro-batches reach backward does not matter.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[Tensor, ...]] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def push(self, out: Tensor, *others: Tensor) -> None:
        """Keep the result of a forward, detached from the graph.

        Args:
            out: (S, B, H, Dv).
            others: what else its backward pass needs: lse (B, H, S), or what linear attention keeps.
        """
        self._kept.append(tuple(x.detach() for x in (out, *others)))

    def pop(self, q_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Take the oldest result.

        Args:
            q_shape: shape (S, B, H, D) of the queries that are being recomputed.

        Raises:
            LightSeqError: nothing is kept, or the oldest result belongs to queries of another shape, because
                forwards and recomputations did not run in the same order.
        """
        kept = tuple(self._kept[0][0].shape) if self._kept else None
        if kept is None or kept[:3] != tuple(q_shape[:3]):
            raise LightSeqError(
                explain(
                    got=f"recomputing attention for queries {tuple(q_shape)}, the oldest kept output is {kept}",
                    rule="every recomputation follows one forward of the same shape, in the same order",
                    remedy="Recompute in the order of the forwards, or train with --no-keep-attention-on-recompute",
                )
            )
        return self._kept.popleft()

    def clear(self) -> None:
        """Drop everything, as at the start of a step."""
        self._kept.clear()
