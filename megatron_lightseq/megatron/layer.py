"""A transformer layer whose parts may differ from layer to layer, and may have norms after them.

Megatron builds all layers of a pipeline stage from one specification. Here a layer chooses by its own number, which
does not depend on how the pipeline is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import LayerNormImpl
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

Add = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]
"""Megatron's bias-dropout-add: (output, bias), residual, dropout probability to the new residual stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayers:
    """Which layers are linear, and what they are built of."""

    pattern: str
    """For each layer: ``*`` attention, ``G`` a gated delta net, ``L`` linear attention; further ones like the last."""
    delta_net: ModuleSpec
    """In the place of self-attention."""
    delta_net_has_norm: bool
    """Whether it normalises its input itself."""
    core_attention: ModuleSpec
    """In the place of core attention."""

    def of(self, submodules: TransformerLayerSubmodules, number: int) -> TransformerLayerSubmodules:
        """The parts of one layer."""
        kind = self.pattern[min(number, len(self.pattern)) - 1]
        if kind == "G":
            keys = dict(submodules.sharded_state_dict_keys_map)
            if not self.delta_net_has_norm:  # stored as by layers that have it
                keys["input_layernorm."] = "self_attention.in_proj.layer_norm_"
            return replace(submodules, self_attention=self.delta_net, sharded_state_dict_keys_map=keys)
        if kind == "L":
            attention = submodules.self_attention
            parts = replace(attention.submodules, core_attention=self.core_attention)
            return replace(submodules, self_attention=replace(attention, submodules=parts))
        return submodules


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoices:
    """What a layer decides by its number, counted from 1 over the whole model."""

    dense_mlp: ModuleSpec | None = None
    """The MLP of layers without experts, where the specification's own has them."""
    has_experts: tuple[bool, ...] = ()
    """For each layer, with ``dense_mlp``; further layers, of multi-token prediction, are like the last one."""
    linear: LinearLayers | None = None
    """Linear layers in the place of attention."""
    normalises_qk: tuple[bool, ...] = ()
    """For each layer, whether it keeps the norms of queries and keys; empty: all do."""
    norm_after_attention: bool = False
    """Normalise attention's output before it is added to the residual stream."""
    norm_after_mlp: bool = False
    """Normalise the MLP's output before it is added to the residual stream."""

    def of(self, submodules: TransformerLayerSubmodules, number: int) -> TransformerLayerSubmodules:
        """The parts of one layer."""
        if self.dense_mlp is not None and not _entry(self.has_experts, number):
            submodules = replace(submodules, mlp=self.dense_mlp)
        if self.normalises_qk and not _entry(self.normalises_qk, number):
            attention = submodules.self_attention
            parts = replace(attention.submodules, q_layernorm=IdentityOp, k_layernorm=IdentityOp)
            submodules = replace(submodules, self_attention=replace(attention, submodules=parts))
        return submodules if self.linear is None else self.linear.of(submodules, number)


def _entry(flags: tuple[bool, ...], number: int) -> bool:
    return flags[min(number, len(flags)) - 1]


class ChoosingTransformerLayer(TransformerLayer):
    """Megatron's layer, built from the parts that :class:`LayerChoices` gives for its number."""

    def __init__(
        self,
        config: Any,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *args: Any,
        choices: LayerChoices | None = None,
        vp_stage: int | None = None,
        **kwargs: Any,
    ) -> None:
        choices = choices or LayerChoices()
        number = layer_number + get_transformer_layer_offset(config, vp_stage)
        parts = choices.of(submodules, number)
        super().__init__(config, parts, layer_number, *args, vp_stage=vp_stage, **kwargs)
        if choices.norm_after_attention:
            self.post_self_attn_layernorm = _norm(config)
            self.self_attn_bda = _normalised(self.post_self_attn_layernorm, _add_of(self, "self_attn_bda"))
        if choices.norm_after_mlp:
            self.post_mlp_layernorm = _norm(config)
            self.mlp_bda = _normalised(self.post_mlp_layernorm, _add_of(self, "mlp_bda"))


def _add_of(layer: TransformerLayer, name: str) -> Callable[[bool, bool], Add]:
    """What Megatron has built to add an output to the residual stream."""
    add: Callable[[bool, bool], Add] = getattr(layer, name)
    return add


def _norm(config: Any) -> torch.nn.Module:
    norm: torch.nn.Module = LayerNormImpl(
        config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
    )
    return norm


def _normalised(norm: torch.nn.Module, make: Callable[[bool, bool], Add]) -> Callable[[bool, bool], Add]:
    """Megatron's bias-dropout-add, which first adds the bias and normalises the output."""

    def make_with_norm(training: bool, fused: bool) -> Add:
        add = make(training, fused)

        def normalise_and_add(
            output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
        ) -> torch.Tensor:
            x, bias = output
            return add((norm(x if bias is None else x + bias), None), residual, dropout)

        return normalise_and_add

    return make_with_norm


class ChoosingSelfAttention(SelfAttention):
    """Megatron's attention, which may choose between two rotary embeddings.

    They arrive in one tensor (S, 2, 1, D) from :class:`~megatron_lightseq.megatron.rope_kinds.TwoBaseRotaryEmbedding`;
    the second is for layers with a sliding window.

    Args:
        has_window: for each layer, counted from 1; empty: there is one rotary embedding.
    """

    def __init__(self, *args: Any, has_window: tuple[bool, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rotary_index = int(_entry(has_window, self.layer_number)) if has_window else None

    def forward(
        self, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Megatron's, with this layer's rotary embedding."""
        if rotary_pos_emb is not None and self._rotary_index is not None:
            rotary_pos_emb = rotary_pos_emb.narrow(1, self._rotary_index, 1)
        result: tuple[torch.Tensor, torch.Tensor] = super().forward(
            *args, rotary_pos_emb=rotary_pos_emb, **kwargs
        )
        return result

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """As Megatron's, which is compiled when it is first called: that takes long on a CPU, and gains nothing.

        With fewer key/value heads than tensor-parallel ranks, the gate (S, B, H, D) has the heads of a whole group,
        of which Megatron gives this rank a part of the queries only.
        """
        groups = gate.numel() // x.numel()
        if groups > 1:
            heads = gate.shape[2] // groups
            gate = gate.narrow(2, self.pg_collection.tp.rank() % groups * heads, heads)
        gate = gate.contiguous().view(x.shape)
        return (x * torch.sigmoid(gate.float())).to(x.dtype)


class QueryKeyL2Norm(torch.nn.Module):
    """Megatron's L2Norm of queries and keys (..., D), in fp32; Megatron's is compiled when it is first called."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, **options: Any) -> None:
        del options
        super().__init__()
        self._shape, self._eps = (hidden_size,), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each vector divided by the root of its mean square, in x's dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.nn.functional.rms_norm(wide, self._shape, None, self._eps).to(x.dtype)
