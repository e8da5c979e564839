"""Every option of Megatron's that touches attention: honoured, refused by name, or no business of attention's.

One table, read by :class:`~megatron_lightseq.megatron.LightSeqCoreAttention`, by the documentation and by a test that
holds it against the installed Megatron: a version with an option that is not in it fails that test in words. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

Verdict = Literal["honoured", "refused", "elsewhere"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """What becomes of one option."""

    verdict: Verdict
    """elsewhere: what it changes lies before, behind or around attention, which need not know of it."""
    reason: str
    harmless: tuple[Any, ...] = ()
    """Of a refused option: values that ask for nothing."""
    remedy: str = "Switch it off, or use Megatron's own attention (cp_method megatron)"

    def refuses(self, value: Any) -> bool:
        """Whether a value of this option cannot be granted; enumerations are known by their names."""
        value = value.name if isinstance(value, Enum) else value
        plain = value is None or isinstance(value, bool | int | float | str)
        return self.verdict == "refused" and not (plain and value in self.harmless)


Options = Mapping[str, Option]


def _honoured(reason: str, *names: str) -> Options:
    return dict.fromkeys(names, Option(verdict="honoured", reason=reason))


def _elsewhere(reason: str, *names: str) -> Options:
    return dict.fromkeys(names, Option(verdict="elsewhere", reason=reason))


def _refused(
    reason: str, *names: str, harmless: tuple[Any, ...] = (None, False), remedy: str | None = None
) -> Options:
    option = Option(verdict="refused", reason=reason, harmless=harmless)
    if remedy is not None:
        option = Option(verdict="refused", reason=reason, harmless=harmless, remedy=remedy)
    return dict.fromkeys(names, option)


CONFIG: Options = {
    # --- scores and masks ---------------------------------------------------------------------------------------------
    **_honoured("read from the tensors", "num_attention_heads", "num_query_groups", "kv_channels"),
    **_honoured("multiplies the scores", "softmax_scale"),
    **_honoured(
        "one more logit in every row, merged by log-sum-exp; learnable ones are trained", "softmax_type"
    ),
    **_honoured(
        "scores are fp32, so scaling them down and up again changes nothing", "apply_query_key_layer_scaling"
    ),
    **_honoured("always so", "attention_softmax_in_fp32"),
    **_honoured("a window for every layer that has one", "window_size", "window_attn_skip_freq"),
    **_honoured("merges follow the schedule: a run repeats bit for bit", "deterministic_mode"),
    **_refused("probabilities are never held", "attention_dropout", harmless=(0, None)),
    **_refused(
        "kernels keep the log-sum-exp of a row and not its maximum", "qk_clip", "log_max_attention_logit"
    ),
    **_refused("attention computes in fp32 from fp32, bf16 or fp16", "fp8_dot_product_attention"),
    **_refused("attention computes in fp32 from fp32, bf16 or fp16", "fp8_multi_head_attention"),
    **_refused(
        "kernels are chosen by cp_kernel",
        "attention_backend",
        harmless=("auto", None),
        remedy="Leave attention_backend at auto, and choose cp_kernel",
    ),
    **_refused("it is another attention", "experimental_attention_variant", "linear_attention_freq"),
    **_refused("it is another attention", "use_kitchen_attention"),
    **_refused("dtypes are those of the tensors given", "enable_autocast"),
    # --- context parallelism ------------------------------------------------------------------------------------------
    **_honoured("must be the size of the group", "context_parallel_size"),
    **_honoured(
        "one kind for all layers, or one for each (0.16.1 itself is off by one there)", "cp_comm_type"
    ),
    **_honoured(
        "with a2a+p2p: the first size is of ranks that exchange heads", "hierarchical_context_parallel_sizes"
    ),
    **_refused(
        "every micro-batch is cut over the same ranks", "hybrid_context_parallel", "max_seqlen_per_dp_cp_rank"
    ),
    # --- recomputation, graphs, offloading ----------------------------------------------------------------------------
    **_honoured(
        "attention's result is kept through every kind, unless keep_attention_on_recompute is off",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "recompute_modules",
    ),
    **_elsewhere(
        "results are kept by checkpoint, whichever there are",
        "distribute_saved_activations",
        "num_microbatches_with_partial_activation_checkpoints",
        "moe_layer_recompute",
    ),
    **_refused(
        "a graph cannot hold transfers that the host starts", "enable_cuda_graph", "external_cuda_graph"
    ),
    **_refused(
        "a graph cannot hold transfers that the host starts", "cuda_graph_impl", harmless=("none", None)
    ),
    **_elsewhere(
        "read with CUDA graphs only",
        "cuda_graph_scope",
        "cuda_graph_use_single_mempool",
        "cuda_graph_retain_backward_graph",
        "cuda_graph_warmup_steps",
    ),
    **_refused(
        "not tested with the buffers of attention", "cpu_offloading", "fine_grained_activation_offloading"
    ),
    **_elsewhere(
        "read with offloading only",
        "cpu_offloading_num_layers",
        "cpu_offloading_activations",
        "cpu_offloading_weights",
        "cpu_offloading_double_buffering",
        "_cpu_offloading_context",
        "offload_modules",
        "min_offloaded_tensor_size",
    ),
    **_refused(
        "its schedule runs pieces of layers out of their order",
        "overlap_moe_expert_parallel_comm",
        "ep_overlap_early_attn_memory_release",
    ),
    # --- positions ----------------------------------------------------------------------------------------------------
    **_honoured(
        "angles are cut by the layout", "rotary_base", "rotary_percent", "rope_type", "rotary_scaling_factor"
    ),
    **_honoured("angles are cut by the layout", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    **_honoured("angles are cut by the layout", "mscale", "mscale_all_dim"),
    **_honoured("adopt_layout refuses layouts that its embedding cannot follow", "mrope_section"),
    **_honoured("given angles of the layout; with latent attention refused when called", "apply_rope_fusion"),
    **_elsewhere(
        "turns queries and keys before attention",
        "rotary_interleaved",
        "no_rope_freq",
        "fused_single_qkv_rope",
    ),
    # --- around attention ---------------------------------------------------------------------------------------------
    **_honoured(
        "queries and values may differ in width", "multi_latent_attention", "q_lora_rank", "kv_lora_rank"
    ),
    **_honoured("queries and values may differ in width", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    **_honoured("the next token is found by the layout", "mtp_num_layers"),
    **_elsewhere("weighs or places losses of further tokens", "mtp_loss_scaling_factor", "mtp_standalone"),
    **_elsewhere("normalises queries and keys before attention", "qk_layernorm", "qk_l2_norm"),
    **_elsewhere("acts on the output", "attention_output_gate"),
    **_elsewhere("a bias of the projection", "add_qkv_bias"),
    **_elsewhere("read with qk_clip only", "qk_clip_alpha", "qk_clip_threshold"),
    **_elsewhere("Megatron's softmax is not run", "masked_softmax_fusion"),
    **_elsewhere(
        "of the layers around attention",
        "tp_comm_overlap_disable_qkv",
        "moe_latent_size",
        "transformer_impl",
        "moe_router_pre_softmax",
        "moe_hybridep_num_sms",
    ),
    **_elsewhere("dtype of autocast", "autocast_dtype"),
    **_elsewhere("the pipeline's shapes; a plan is made for every shape", "variable_seq_lengths"),
    **_elsewhere("random states outside of attention", "use_te_rng_tracker", "inference_rng_tracker"),
    **_refused(
        "gpt_layer_spec is one specification for all layers",
        "heterogeneous_block_specs",
        remedy="Put LightSeqCoreAttention into your own layers' specifications, without heterogeneous_block_specs",
    ),
    **_elsewhere("of checkpoints", "hetereogenous_dist_checkpoint"),
    **_elsewhere(
        "of linear layers: attention is given fp32, bf16 or fp16",
        *(
            "fp8",
            "fp8_recipe",
            "fp8_param",
            "fp8_quantizer_factory",
            "fp8_margin",
            "fp8_interval",
            "fp8_wgrad",
        ),
        *("fp8_amax_history_len", "fp8_amax_compute_algo", "activation_func_fp8_input_store", "quant_recipe"),
        *(
            "fp4",
            "fp4_recipe",
            "fp4_param",
            "fp4_quantizer_factory",
            "use_kitchen",
            "kitchen_attention_backend",
        ),
        *("moe_router_padding_for_fp8", "moe_router_padding_for_quantization"),
    ),
    **_elsewhere(
        "of attentions that are refused",
        *("dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk", "dsa_indexer_loss_coeff"),
        *(
            "dsa_indexer_use_sparse_loss",
            "linear_conv_kernel_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
        ),
        *("linear_num_key_heads", "linear_num_value_heads"),
    ),
    **_elsewhere("of layers without attention", "is_hybrid_model", "mamba_head_dim", "mamba_num_heads"),
    # --- inference ----------------------------------------------------------------------------------------------------
    **_refused(
        "attention is for training and evaluation",
        "flash_decode",
        "batch_invariant_mode",
        "cache_mla_latents",
    ),
    **_elsewhere(
        "of inference engines, whose calls are refused",
        *("inference_sampling_seed", "use_inference_optimized_layers", "inference_fuse_tp_communication"),
    ),
}
"""Fields of TransformerConfig and MLATransformerConfig."""

CONSTRUCTOR: Options = {
    **_honoured("", "config", "layer_number", "attn_mask_type", "softmax_scale", "cp_comm_type"),
    **_honoured("the context-parallel group is taken from it", "pg_collection", "model_comm_pgs"),
    **_refused("queries, keys and values are of one sequence", "attention_type", harmless=("self",)),
    **_refused("probabilities are never held", "attention_dropout", harmless=(0, None)),
    **_elsewhere("read from the tensors", "k_channels", "v_channels"),
    **_refused("it tunes another kernel", "num_splits"),
}
"""Arguments that core_attention is built with."""

FORWARD: Options = {
    **_honoured("", "query", "key", "value"),
    **_honoured("causal and no_mask; others are refused", "attn_mask_type"),
    **_elsewhere("the mask's type says what may be seen", "attention_mask"),
    **_refused("scores are never held", "attention_bias"),
    **_refused("shards are of whole sequences", "packed_seq_params"),
    **_refused("it tunes another kernel", "num_splits"),
}
"""Arguments that core_attention is called with."""

RELATED = re.compile(
    r"attn|attention|softmax|^qk|_qk|qkv|window|rope|rotary|context_parallel|^cp_|head|kv_|query|flash|fp8|fp4|quant"
    r"|kitchen|cuda_graph|offload|recompute|deterministic|batch_invariant|mtp|overlap_moe|^dsa|^linear_|latent|hybrid"
    r"|hete?re?o|inference|seqlen|seq_len|lora_rank|mscale|beta_|autocast|transformer_impl|activation_checkpoint"
    r"|rng_tracker|original_max"
)
"""Names of fields that have to be in :data:`CONFIG` for Megatron's configuration to be understood."""


def first_refused(config: Any, but: Container[str] = ()) -> tuple[str, Option] | None:
    """The first option of a configuration that cannot be granted, and what the table says of it.

    Args:
        config: Megatron's, of any version: fields that it lacks ask for nothing.
        but: names that are not looked at.
    """
    for name, option in CONFIG.items():
        if name not in but and hasattr(config, name) and option.refuses(getattr(config, name)):
            return name, option
    return None
