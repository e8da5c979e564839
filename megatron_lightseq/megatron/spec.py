"""Layer specifications for Megatron's GPTModel: Megatron's own, with ``core_attention`` replaced by ours.

    config = TransformerConfig(..., context_parallel_size=2)
    model = GPTModel(config, gpt_layer_spec(config, context=ContextParallelConfig(cp_method="lightseq")), ...)
    adopt_layout(model)

Everything else in the layer (norms, MLPs, mixture of experts, latent attention) stays Megatron's: modules from
Transformer Engine if it can be imported, otherwise Megatron's local ones.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_lightseq.attention import AttentionStats
from megatron_lightseq.config import ContextParallelConfig, PretrainConfig
from megatron_lightseq.config.layer_pattern import LayerPattern, spelled_out
from megatron_lightseq.config.resolved import ResolvedAttention, resolve_attention
from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.megatron.core_attention import CoreAttentionSettings, LightSeqCoreAttention
from megatron_lightseq.megatron.fixes.latent_attention import LatentDotProductAttention
from megatron_lightseq.megatron.layer import (
    ChoosingSelfAttention,
    ChoosingTransformerLayer,
    LayerChoices,
    QueryKeyL2Norm,
)
from megatron_lightseq.megatron.linear_layer import LinearSettings
from megatron_lightseq.megatron.linear_spec import LAYER_KINDS, linear_pattern, with_linear_layers
from megatron_lightseq.megatron.rope import allow_any_number_of_ranks
from megatron_lightseq.megatron.score_settings import ScoreSettings
from megatron_lightseq.megatron.transformer_impl import use_transformer_engine

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def gpt_layer_spec(
    config: TransformerConfig | PretrainConfig,
    *,
    context: ContextParallelConfig | None = None,
    keep_attention_on_recompute: bool | None = None,
    stats: AttentionStats | None = None,
    resolved: ResolvedAttention | None = None,
) -> ModuleSpec:
    """The specification of one decoder layer with LightSeq attention.

    Args:
        config: the configuration of the layer: Megatron's TransformerConfig, or this package's PretrainConfig.
        context: method, layout, kernel and overlap; default: those of a PretrainConfig, else the defaults.
            ``cp_method="megatron"`` returns Megatron's specification unchanged, for a baseline, except that latent
            attention without Transformer Engine gets a core attention that pads its values, as Megatron has none.
        keep_attention_on_recompute: whether attention results survive activation recomputation; default: the value in a
            PretrainConfig, else True.
        stats: counters of forwards, bytes and waiting time that all layers share; default: new ones.
        resolved: layout, methods and schedules of a PretrainConfig, if they are known already.

    Returns:
        A ModuleSpec for ``GPTModel(transformer_layer_spec=...)``. Pass the built model to
        :func:`megatron_lightseq.megatron.adopt_layout`.

    Raises:
        ConfigError: MLS_TRANSFORMER_IMPL names an implementation that is unknown or cannot be imported.
    """
    if isinstance(config, PretrainConfig):
        if context is None:
            context = config.context
            resolved = resolved or resolve_attention(config)
        if keep_attention_on_recompute is None:
            keep_attention_on_recompute = config.recompute.keep_attention_on_recompute
    context = context or ContextParallelConfig()
    allow_any_number_of_ranks()
    spec = _with_choices(_megatron_layer_spec(config), config)
    keep = True if keep_attention_on_recompute is None else keep_attention_on_recompute
    stats = AttentionStats() if stats is None else stats
    if isinstance(config, PretrainConfig):
        linear = LinearSettings(
            kernel=config.linear.cp_linear_kernel,
            scan=config.linear.cp_linear_scan,
            network=context.network,
            keep_on_recompute=keep,
            plain_output_norm=config.linear.linear_plain_output_norm,
            stats=stats,
        )
        spec = with_linear_layers(spec, linear_pattern(config), linear, rms_norm=_has_rms_norm(config))
    if context.cp_method == "megatron":
        return _with_latent_baseline(spec)
    settings = CoreAttentionSettings(
        method=context.method_name,
        comm_types=context.cp_comm_type,
        ulysses_size=context.cp_ulysses_size or _inner_size(config),
        layout=context.layout_name if resolved is None else resolved.layout.name,
        kernel=context.cp_kernel,
        overlap=context.cp_overlap,
        invariant_chunk=context.cp_invariant,
        verify_transport=context.cp_verify_transport,
        network=context.network,
        resolved=resolved,
        scores=_scores(config),
        keep_on_recompute=keep,
        stats=stats,
    )
    return _with_core_attention(spec, settings)


def hybrid_block_spec(
    config: TransformerConfig,
    pattern: str,
    *,
    context: ContextParallelConfig | None = None,
    scan: str = "ring",
    kernel: str = "auto",
    keep_attention_on_recompute: bool = True,
    stats: AttentionStats | None = None,
) -> ModuleSpec:
    """The specification of a block whose layers are of several kinds, for every pipeline stage.

        model = GPTModel(config, hybrid_block_spec(config, "GGG*"), ...)
        layout = adopt_layout(model)

    Args:
        config: Megatron's; its ``linear_*`` fields are the widths of gated delta nets. Leave its
            ``experimental_attention_variant`` at None, which is about Megatron's own layers.
        pattern: one letter for each layer, repeated over the layers: ``*`` softmax attention, ``G`` a gated delta net,
            ``L`` linear attention.
        context: of the layers with softmax attention; their layout must be contiguous over several ranks.
        scan: how the states of linear layers travel, as in :func:`megatron_lightseq.dist_linear_attention`.
        kernel: of linear layers, as there.
        keep_attention_on_recompute: whether results survive activation recomputation.
        stats: counters that all layers share; default: new ones.

    Returns:
        What ``GPTModel(transformer_layer_spec=...)`` takes. Each layer chooses its kind by its number.

    Raises:
        ConfigError: another letter, or softmax layers on a layout that is not contiguous.
    """
    context = context or ContextParallelConfig()
    stats = AttentionStats() if stats is None else stats
    _check_pattern(pattern, context, config.context_parallel_size)
    spec = gpt_layer_spec(
        config, context=context, keep_attention_on_recompute=keep_attention_on_recompute, stats=stats
    )
    settings = LinearSettings(
        kernel=kernel,
        scan=scan,
        network=context.network,
        keep_on_recompute=keep_attention_on_recompute,
        stats=stats,
    )
    whole = pattern * -(-config.num_layers // len(pattern))
    # With it, Megatron's checkpoints keep layers of different kinds apart.
    config.linear_attention_freq = [int(letter != "*") for letter in whole[: config.num_layers]]
    return with_linear_layers(spec, whole[: config.num_layers], settings, rms_norm=_has_rms_norm(config))


def _check_pattern(pattern: str, context: ContextParallelConfig, cp_size: int) -> None:
    if not pattern or not set(pattern) <= set(LAYER_KINDS):
        raise ConfigError(
            explain(
                got=f"the layer pattern {pattern!r}",
                rule=f"letters are {', '.join(f'{letter} ({kind})' for letter, kind in LAYER_KINDS.items())}",
                remedy='Write, for example, "GGG*"',
            )
        )
    cut = context.cp_method != "megatron" and context.layout_name == "contiguous"
    if set(pattern) != {"*"} and cp_size > 1 and not cut:
        raise ConfigError(
            explain(
                got=f"linear layers next to cp_method {context.cp_method} on layout {context.layout_name}, over "
                f"{cp_size} ranks",
                rule="a state goes through the tokens in their order, so every rank holds adjacent ones",
                remedy="Use cp_method lightseq, whose layout is contiguous",
            )
        )


def _has_rms_norm(config: TransformerConfig | PretrainConfig) -> bool:
    name = config.model.normalization if isinstance(config, PretrainConfig) else config.normalization
    return bool(name == "RMSNorm")


def _inner_size(config: TransformerConfig | PretrainConfig) -> int | None:
    """The number of ranks that exchange heads in Megatron's a2a+p2p: the first of its hierarchical sizes."""
    sizes = getattr(config, "hierarchical_context_parallel_sizes", None)
    return sizes[0] if sizes else None


def _with_core_attention(spec: ModuleSpec, settings: CoreAttentionSettings) -> ModuleSpec:
    spec = copy.deepcopy(spec)  # Megatron may return one object to several callers
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(module=LightSeqCoreAttention, params={"settings": settings})
    return spec


def _with_latent_baseline(spec: ModuleSpec) -> ModuleSpec:
    attention = spec.submodules.self_attention
    if attention.module is MLASelfAttention and attention.submodules.core_attention is DotProductAttention:
        spec = copy.deepcopy(spec)
        spec.submodules.self_attention.submodules.core_attention = LatentDotProductAttention
    return spec


def _megatron_layer_spec(config: TransformerConfig | PretrainConfig) -> ModuleSpec:
    options: dict[str, Any] = _layer_options(config)
    normalization = options.pop("normalization")
    if use_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(**options)
    return get_gpt_layer_local_spec(normalization=normalization, **options)


def _layer_options(config: TransformerConfig | PretrainConfig) -> dict[str, Any]:
    if isinstance(config, PretrainConfig):
        return {
            "normalization": config.model.normalization,
            "qk_layernorm": config.model.qk_layernorm,
            "qk_l2_norm": config.model.qk_l2_norm,
            "num_experts": config.experts.num_experts,
            "moe_grouped_gemm": config.experts.moe_grouped_gemm,
            "multi_latent_attention": config.model.multi_latent_attention,
        }
    return {
        "normalization": config.normalization,
        "qk_layernorm": config.qk_layernorm,
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "multi_latent_attention": config.multi_latent_attention,
    }


def _with_choices(spec: ModuleSpec, config: TransformerConfig | PretrainConfig) -> ModuleSpec:
    """A layer that chooses its parts by its number, if the configuration asks for it; else the same specification."""
    if isinstance(config, PretrainConfig):
        choices = _choices(config)
        spec = _with_attention_choices(spec, config)
    else:
        freq, experts = getattr(config, "moe_layer_freq", 1), getattr(config, "num_moe_experts", None)
        pattern = tuple(freq) if isinstance(freq, list) else freq
        choices = _dense_layers(pattern, config.num_layers) if experts else LayerChoices()
    if choices == LayerChoices():
        return spec
    return replace(spec, module=ChoosingTransformerLayer, params={**spec.params, "choices": choices})


def _choices(config: PretrainConfig) -> LayerChoices:
    model = config.model
    dense = LayerChoices()
    if config.experts.num_experts is not None:
        dense = _dense_layers(config.experts.moe_layer_freq, model.num_layers)
    rotated = tuple(config.rope.is_in(number) for number in range(1, model.num_layers + 1))
    return replace(
        dense,
        normalises_qk=rotated if model.qk_l2_norm else (),
        norm_after_attention=model.post_self_attn_layernorm,
        norm_after_mlp=model.post_mlp_layernorm,
    )


def _dense_layers(pattern: LayerPattern, num_layers: int) -> LayerChoices:
    """The choice between experts and a plain MLP; none where every layer has experts."""
    has_experts = tuple(map(bool, spelled_out(pattern, num_layers)))
    if all(has_experts):
        return LayerChoices()
    return LayerChoices(
        dense_mlp=get_mlp_module_spec(use_te=use_transformer_engine()), has_experts=has_experts
    )


def _with_attention_choices(spec: ModuleSpec, config: PretrainConfig) -> ModuleSpec:
    """Attention with two rotary embeddings, with an output gate or with L2 norms; else the same specification."""
    model, attention = config.model, spec.submodules.self_attention
    local = config.rope.rotary_base_local is not None
    if not local and not model.attention_output_gate and not model.qk_l2_norm:
        return spec
    layers = range(1, model.num_layers + 1) if local else ()
    params = {**attention.params, "has_window": tuple(model.has_window(number) for number in layers)}
    parts = attention.submodules
    if model.qk_l2_norm:
        parts = replace(parts, q_layernorm=QueryKeyL2Norm, k_layernorm=QueryKeyL2Norm)
    attention = replace(attention, module=ChoosingSelfAttention, params=params, submodules=parts)
    return replace(spec, submodules=replace(spec.submodules, self_attention=attention))


def _scores(config: TransformerConfig | PretrainConfig) -> ScoreSettings:
    """What attention does with scores and queries that TransformerConfig has no fields for."""
    if not isinstance(config, PretrainConfig):
        return ScoreSettings()
    model = config.model
    tuned = (model.attn_scale, model.floor_scale) if model.attn_temperature_tuning else None
    return ScoreSettings(
        softcap=model.attn_logit_softcapping, chunk=model.attention_chunk_size, temperature=tuned
    )


def mtp_block_spec(layer: ModuleSpec, num_layers: int) -> MultiTokenPredictionBlockSubmodules:
    """The specification of multi-token prediction, for ``GPTModel(mtp_block_spec=...)`` on the last pipeline stage.

    Args:
        layer: the result of :func:`gpt_layer_spec`, or a modification of it.
        num_layers: number of further tokens that are predicted.
    """
    depth = get_mtp_layer_spec(layer, use_transformer_engine())
    return MultiTokenPredictionBlockSubmodules(layer_specs=[depth] * num_layers)
