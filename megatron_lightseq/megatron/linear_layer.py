"""What linear layers share: settings, masks that a state can follow, and results kept across recomputation.

Shapes, per rank: S local tokens, B micro-batch, H heads of the state, K and V its dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_lightseq.attention import AttentionStats
from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.linear import DistLinearAttention
from megatron_lightseq.mask import Mask
from megatron_lightseq.megatron.bounded_cache import BoundedCache
from megatron_lightseq.megatron.checkpoint_scope import current_scope, track_checkpoints
from megatron_lightseq.megatron.dense_mask import DenseMasks
from megatron_lightseq.megatron.packed import shard_of
from megatron_lightseq.megatron.sequence_layer import SequenceLayer
from megatron_lightseq.schedule import Network
from megatron_lightseq.transport.group import rank_in

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

_CAUSAL = Mask.causal()


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSettings:
    """What a layer specification hands to every linear layer."""

    layout: str = "contiguous"
    """Which rank holds which tokens; over several ranks only ``contiguous``."""
    kernel: str = "auto"
    """A linear kernel's name."""
    scan: str = "ring"
    """How states travel."""
    network: Network | None = None
    """What scan ``auto`` predicts with; None for the default."""
    keep_on_recompute: bool = True
    """Keep results and states across activation recomputation instead of computing them again."""
    plain_output_norm: bool = False
    """The factor of a delta net's output norm is its weight, also where other norms have the factor 1 + weight."""
    stats: AttentionStats = field(default_factory=AttentionStats)
    """Counts of all layers built with these settings."""
    _shared: BoundedCache[Any, DistLinearAttention] = field(
        default_factory=lambda: BoundedCache(4), repr=False, compare=False
    )
    _dense_masks: DenseMasks = field(default_factory=DenseMasks, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearSettings:
        """Itself, so that layers built from copied specifications share plans and counters."""
        del memo
        return self

    def attention(
        self, group: torch.distributed.ProcessGroup | None, *, normalize: bool
    ) -> DistLinearAttention:
        """The linear attention that layers with these settings share, with its plans."""

        def make() -> DistLinearAttention:
            return DistLinearAttention(
                group,
                layout=self.layout,
                kernel=self.kernel,
                scan=self.scan,
                network=self.network,
                normalize=normalize,
                stats=self.stats,
            )

        return self._shared.get((group, normalize), make)

    def mask_of(self, hidden: Tensor, layer: LinearLayer) -> Mask:
        """The mask that a dense one stands for; layers share what was read."""
        return self._dense_masks.read(hidden, layer.layout, layer.group, causal=True)


class LinearLayer(SequenceLayer):
    """A layer whose tokens change a state and read from it.

    Raises:
        ConfigError: the sizes of the context-parallel group and of the configuration differ.
        UnsupportedError: the sequence is not cut contiguously.
    """

    layer_number: int = 0
    """From 1; 0: not known."""

    def __init__(self, config: Any, groups: Any, settings: LinearSettings | None, *, normalize: bool) -> None:
        self.settings = settings or LinearSettings()
        super().__init__(config, groups, self.settings.layout)
        self._attention = self.settings.attention(self.group, normalize=normalize)
        if self.settings.keep_on_recompute:
            track_checkpoints()

    def mask_for(self, hidden: Tensor | None, params: PackedSeqParams | None, tokens: int) -> Mask:
        """Which tokens see each other.

        Args:
            hidden: a dense mask, (B or 1, 1, S, S * cp_size); True where a key is hidden.
            params: packed documents.
            tokens: S.

        Raises:
            UnsupportedError: both, or a mask that no state can follow.
            ConfigError: borders of documents that are not those of these tokens.
        """
        self.check_adopted()
        if params is None:
            return _CAUSAL if hidden is None else _CAUSAL & self.settings.mask_of(hidden, self)
        if hidden is not None:
            raise UnsupportedError(
                explain(
                    got=f"packed_seq_params together with an attention_mask of shape {tuple(hidden.shape)}",
                    rule="the borders of packed sequences say which tokens a token sees",
                    remedy="Give attention_mask=None",
                )
            )
        shard = shard_of(params, self.layout, rank_in(self.group))
        shard.packing.check_tokens(tokens * self.layout.cp_size)
        return shard.mask(True, None)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        *,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        """Linear attention (S, B, H, V); its result is kept where this call belongs to a checkpoint.

        Args:
            q: (S, B, H or fewer, K).
            k: (S, B, H or fewer, K).
            v: (S, B, H or fewer, V).
            mask: which tokens see each other.
            log_decay: (S, B, H).
            beta: (S, B, H).
        """
        self.settings.stats.place.layer = self.layer_number
        attention = self._attention
        scope = current_scope() if self.settings.keep_on_recompute else None
        if scope is None:
            return attention(q, k, v, log_decay=log_decay, beta=beta, mask=mask)
        stash = scope.stash(self)
        if not scope.replaying:
            result = attention.forward_with_states(q, k, v, log_decay=log_decay, beta=beta, mask=mask)
            stash.push(*result.kept)
            return result.out
        if not stash:  # the second backward through a retained graph: the first one has consumed the result
            return attention(q, k, v, log_decay=log_decay, beta=beta, mask=mask)
        heads = max(x.shape[2] for x in (q, k, v))
        out, states, transitions = stash.pop((*q.shape[:2], heads))
        kept = (out, states, transitions)
        return attention.reattach(q, k, v, kept, log_decay=log_decay, beta=beta, mask=mask)
