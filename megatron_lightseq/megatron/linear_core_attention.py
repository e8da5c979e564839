"""Linear attention in the place of Megatron's ``core_attention``, without parameters of its own.

It is normalised linear attention with the feature map elu(x) + 1 (arXiv 2006.16236): the memory of a token's past is a
state whose size does not depend on the sequence's length.

Shapes, per rank: S local tokens, B micro-batch, H query heads, G key/value heads (G divides H), D and Dv head dims.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.megatron.linear_layer import LinearLayer, LinearSettings

_CAUSAL_TYPES = (AttnMaskType.causal, AttnMaskType.padding_causal)


class LinearCoreAttention(LinearLayer):
    """Drop-in for ``DotProductAttention`` whose work and memory grow with the sequence's length, not its square.

    Args:
        config: Megatron's.
        layer_number: from 1.
        attn_mask_type: causal.
        attention_type: ``self``.
        pg_collection: Megatron's groups; default: its global ones.
        settings: shared by all layers.
        options: other arguments of Megatron's attention. Scales of scores cancel in the normalisation.

    Raises:
        UnsupportedError: dropout, another mask type, or cross-attention.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        pg_collection: Any = None,
        settings: LinearSettings | None = None,
        **options: Any,
    ) -> None:
        groups = pg_collection or options.pop("model_comm_pgs", None)
        super().__init__(config, groups, settings, normalize=True)
        self.layer_number, self.attn_mask_type = layer_number, attn_mask_type
        dropout = options.get("attention_dropout")
        dropout = config.attention_dropout if dropout is None else dropout
        if dropout or attention_type != "self":
            raise _refused(f"attention_dropout {dropout} and attention_type {attention_type}")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: Any = None,
        **extras: Any,
    ) -> Tensor:
        """Attention of this rank's queries over all earlier keys and values.

        Args:
            query: (S, B, H, D); (S, H, D) of packed sequences.
            key: (S, B, G, D) or (S, G, D).
            value: (S, B, G, Dv) or (S, G, Dv).
            attention_mask: dense, as for :class:`LightSeqCoreAttention`; documents are read from it.
            attn_mask_type: overrides the type given at construction.
            packed_seq_params: documents.
            extras: refused unless None.

        Returns:
            (S, B, H * Dv), in query's dtype; B is 1 for packed sequences.

        Raises:
            UnsupportedError: a mask that no state can follow, another mask type, or a bias.
            LayoutError: the model was not passed to :func:`megatron_lightseq.megatron.adopt_layout`.
        """
        mask_type = attn_mask_type or self.attn_mask_type
        given = [name for name, extra in extras.items() if extra is not None]
        if given or mask_type not in _CAUSAL_TYPES:
            raise _refused(f"attn_mask_type {mask_type.name}{''.join(f' and {name}' for name in given)}")
        mask = self.mask_for(attention_mask, packed_seq_params, len(query))
        query, key, value = (x.unsqueeze(1) if x.dim() == 3 else x for x in (query, key, value))
        out = self.attend(_positive(query), _positive(key), value, mask)
        return out.flatten(2)


def _positive(x: Tensor) -> Tensor:
    """The feature map: queries or keys with positive products."""
    return F.elu(x) + 1


def _refused(got: str) -> UnsupportedError:
    return UnsupportedError(
        explain(
            got=f"linear attention with {got}",
            rule="it is causal self-attention, without dropout and without a bias of scores",
            remedy="Leave them out, or use softmax attention in this layer",
        )
    )
