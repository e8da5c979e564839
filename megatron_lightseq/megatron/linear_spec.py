"""Linear layers in Megatron's layer specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.megatron.gated_delta_net import GatedDeltaNetParts, LightSeqGatedDeltaNet
from megatron_lightseq.megatron.layer import ChoosingTransformerLayer, LayerChoices, LinearLayers
from megatron_lightseq.megatron.linear_core_attention import LinearCoreAttention
from megatron_lightseq.megatron.linear_layer import LinearSettings
from megatron_lightseq.megatron.transformer_impl import use_transformer_engine

LAYER_KINDS = {"*": "softmax attention", "G": "gated delta net", "L": "linear attention"}
"""Letters of a pattern of layers."""
_LETTERS = {"gated_delta_net": "G", "linear": "L"}


def linear_pattern(config: PretrainConfig) -> str:
    """One letter of :data:`LAYER_KINDS` for each layer of a run."""
    letter = _LETTERS.get(config.linear.experimental_attention_variant or "", "*")
    layers = range(1, config.model.num_layers + 1)
    return "".join(letter if config.linear.is_in(number) else "*" for number in layers)


def with_linear_layers(
    spec: ModuleSpec, pattern: str, settings: LinearSettings, *, rms_norm: bool
) -> ModuleSpec:
    """A specification whose layers are of the kinds of a pattern, which each chooses by its number.

    Args:
        spec: of one layer with attention.
        pattern: one letter of :data:`LAYER_KINDS` for each layer.
        settings: of the linear layers.
        rms_norm: whether norms are RMSNorm.
    """
    if set(pattern) <= {"*"}:
        return spec
    provider = _provider()
    fused = provider.column_parallel_layer_norm_linear()
    parts = GatedDeltaNetParts(
        in_proj=fused or provider.column_parallel_linear(),
        out_norm=provider.layer_norm(rms_norm=rms_norm, for_qk=False),
        out_proj=provider.row_parallel_linear(),
    )
    params = {"settings": settings}
    linear = LinearLayers(
        pattern=pattern,
        delta_net=ModuleSpec(module=LightSeqGatedDeltaNet, submodules=parts, params=params),
        delta_net_has_norm=fused is not None,
        core_attention=ModuleSpec(module=LinearCoreAttention, params=params),
    )
    choices = replace(spec.params.get("choices", LayerChoices()), linear=linear)
    return replace(spec, module=ChoosingTransformerLayer, params={**spec.params, "choices": choices})


def _provider() -> Any:
    """Megatron's choice of modules."""
    if not use_transformer_engine():
        return LocalSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
