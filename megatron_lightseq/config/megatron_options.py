"""What becomes of Megatron's options, in one table: in attention, in recipes, and in the Megatron-LM launcher.

A row names options that are treated the same way and gives the reason once. Three places read it:

* *attention*: the configuration and the arguments with which Megatron-Core builds and calls
  :class:`megatron_lightseq.megatron.LightSeqCoreAttention`;
* *launcher*: the command line of ``lightseq megatron-lm``;
* *recipe*: the files and the command line of ``lightseq pretrain``.

docs/megatron-options.md and docs/megatron-lm.md are generated from it. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lightseq.config.megatron_option import (
    CUT_TOKENS,
    DROPPED_BY_RANK,
    IN_LAUNCHER,
    LOST_DOCUMENTS,
    ROUTING,
    SLICED_LOSS,
    SLICED_MLP,
    TENSOR_PARALLEL,
    Kind,
    Option,
    Spelling,
    honoured,
    instead,
    launcher_row,
    outside,
    refused,
    row,
)
from megatron_lightseq.config.recipe_arguments import RECIPE

_OTHER_ATTENTION = "it selects another attention"
_OWN_LAYERS = "its layers take their attention from their own specification"
_UNTESTED_OFFLOADING = "it was not tested together with attention's buffers"
_PACKED = "it packs several documents into one sequence, and shards here are cut from whole sequences"
_LOCAL_COUNT = (
    "each rank would count its own tokens only, so the loss would depend on how many ranks share them"
)
_OWN_LOGITS = "sliced losses need the output layer's own logits, and nothing else may use them"
_FULL_ROUTING = "Use context_parallel_size 1 and tensor_model_parallel_size 1, or route without it"

ATTENTION: tuple[Option, ...] = (
    # Scores and masks.
    honoured("num_attention_heads num_query_groups", "read from the shapes of q, k and v", recipe="key"),
    honoured("kv_channels", "read from the shapes of q, k and v", recipe="key"),
    honoured("softmax_scale", "scores are multiplied by it", recipe="key"),
    honoured(
        "softmax_type",
        "off-by-one and learnable add one logit per row, merged through its log-sum-exp; learnable ones are trained",
        recipe="key",
    ),
    honoured("apply_query_key_layer_scaling", "it protects fp16 scores from overflow; scores are fp32 here"),
    honoured("attention_softmax_in_fp32", "always the case", recipe=Spelling()),
    honoured(
        "window_size window_attn_skip_freq", "a window for each layer that should have one", recipe="key"
    ),
    honoured(
        "deterministic_mode", "results are merged in the order of the schedule, so runs are bitwise equal"
    ),
    honoured("mup_base_head_dim mup_attn_scale_power", "they set softmax_scale"),
    refused(
        "attention_dropout",
        "attention probabilities are never stored, so none can be dropped",
        harmless=(0, None),
        remedy="Set attention_dropout to 0 to train without it, or keep it with Megatron's own attention "
        "(cp_method megatron)",
        recipe="key",
    ),
    refused("qk_clip log_max_attention_logit", "kernels keep the log-sum-exp of a row, not its maximum"),
    refused(
        "fp8_dot_product_attention fp8_multi_head_attention",
        "attention takes fp32, bf16 and fp16 inputs only",
        launcher="outside",
    ),
    row(
        "attention_backend",
        "the attention kernel is chosen by cp_kernel",
        attention="replaced",
        launcher="replaced",
        harmless=("auto", None),
        recipe=instead("Use cp_kernel to choose the attention kernel"),
    ),
    row(
        "flash_attention_version",
        "the attention kernel is chosen by cp_kernel",
        attention="replaced",
        launcher="replaced",
        harmless=(None,),
    ),
    refused("experimental_attention_variant", _OTHER_ATTENTION, recipe="key"),
    refused("use_kitchen_attention", _OTHER_ATTENTION),
    refused("enable_autocast", "attention computes in the dtype of its inputs", launcher="outside"),
    # Context parallelism.
    honoured("context_parallel_size", "must be the size of the context-parallel group", recipe="key"),
    honoured("cp_comm_type", "one method for all layers, or one per layer", recipe="key"),
    honoured(
        "hierarchical_context_parallel_sizes",
        "with a2a+p2p: the first size is the number of ranks that exchange heads",
        recipe=instead("Use cp_method: usp with cp_ulysses_size, the first of the two sizes"),
    ),
    refused(
        "hybrid_context_parallel max_seqlen_per_dp_cp_rank",
        "every micro-batch is cut over all ranks of one context-parallel group",
    ),
    # Recomputation, CUDA graphs, offloading.
    honoured(
        "recompute_granularity recompute_method recompute_num_layers recompute_modules",
        "attention results survive every kind of recomputation, unless keep_attention_on_recompute is off",
        recipe="key",
    ),
    outside(
        "distribute_saved_activations num_microbatches_with_partial_activation_checkpoints moe_layer_recompute "
        "mhc_recompute_layer_num",
        "attention results are kept with each of Megatron's checkpoints",
    ),
    refused(
        "enable_cuda_graph external_cuda_graph", "a CUDA graph cannot capture transfers that the host starts"
    ),
    refused(
        "cuda_graph_impl",
        "a CUDA graph cannot capture transfers that the host starts",
        harmless=("none", None),
    ),
    outside(
        "cuda_graph_scope cuda_graph_modules inference_cuda_graph_scope cuda_graph_use_single_mempool "
        "cuda_graph_retain_backward_graph cuda_graph_warmup_steps",
        "read with CUDA graphs only",
    ),
    refused("cpu_offloading", _UNTESTED_OFFLOADING, launcher="outside"),
    refused("fine_grained_activation_offloading", _UNTESTED_OFFLOADING),
    outside("cpu_offloading_num_layers", _UNTESTED_OFFLOADING, launcher="refused", harmless=(0, None)),
    outside(
        "cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering "
        "cpu_offloading_retain_pinned_cpu_buffers _cpu_offloading_context offload_modules min_offloaded_tensor_size "
        "fine_grained_offloading_max_inflight_offloads delay_offload_until_cuda_graph "
        "delta_offload_bytes_across_pp_ranks activation_offload_fraction",
        "read with offloading only",
    ),
    refused(
        "overlap_moe_expert_parallel_comm ep_overlap_early_attn_memory_release",
        "its schedule splits layers and runs the parts out of order",
    ),
    # Positions.
    honoured("rotary_base rotary_percent", "rotary embeddings are cut by the layout", recipe="key"),
    honoured(
        "rope_type",
        "rotary embeddings are cut by the layout",
        recipe="key",
    ),
    honoured(
        "rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim",
        "rotary embeddings are cut by the layout",
        recipe="key",
    ),
    honoured("mrope_section", "its embedding cuts itself by zigzag, and adopt_layout refuses other layouts"),
    honoured(
        "apply_rope_fusion", "it gets embeddings cut by the layout; with latent attention a call is refused"
    ),
    outside("rotary_interleaved no_rope_freq", "RoPE is applied to q and k before attention", recipe="key"),
    outside("fused_single_qkv_rope", "RoPE is applied to q and k before attention"),
    # Routing, which sees a rank's own tokens.
    honoured(
        "moe_router_load_balancing_type",
        "sinkhorn balances experts over all tokens of a micro-batch",
        recipe="key",
    ),
    refused(
        "moe_expert_capacity_factor",
        _LOCAL_COUNT,
        condition=DROPPED_BY_RANK,
        remedy="Use moe_token_drop_policy probs without moe_pad_expert_input_to_capacity, which drops the tokens that "
        "one process drops",
        recipe=instead(ROUTING),
    ),
    refused(
        "moe_expert_rank_capacity_factor",
        _LOCAL_COUNT,
        condition=CUT_TOKENS,
        remedy=_FULL_ROUTING,
        recipe=instead(ROUTING),
    ),
    # Around attention.
    honoured(
        "multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim",
        "queries and values may have different head dims",
        recipe="key",
    ),
    honoured("mtp_num_layers", "the next token is found by the layout", recipe="key"),
    honoured("mtp_use_repeated_layer", "the next token is found by the layout"),
    outside("mtp_loss_scaling_factor", "it weighs the losses of further tokens", recipe="key"),
    outside(
        "mtp_standalone mtp_detach_heads mtp_grad_scale_func mtp_hsm mtp_hybrid_override_pattern",
        "they place, weigh or mix the layers of multi-token prediction",
    ),
    outside("qk_layernorm", "it normalises q and k before attention", recipe="key"),
    outside("qk_l2_norm", "it normalises q and k before attention", recipe="key"),
    outside("attention_output_gate", "it acts on attention's output", recipe="key"),
    outside("add_qkv_bias", "it is a bias of the QKV projection", recipe="key"),
    outside("qk_clip_alpha qk_clip_threshold", "read with qk_clip only"),
    outside("masked_softmax_fusion", "Megatron's softmax is not used"),
    outside(
        "transformer_impl",
        "it chooses the layers around attention",
        launcher="refused",
        harmless=("local", "transformer_engine", None),
        remedy="Set transformer_impl to local or transformer_engine",
        recipe=instead("Remove it: Transformer Engine's modules are used where it can be imported"),
    ),
    outside(
        "tp_comm_overlap_disable_qkv moe_latent_size moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing "
        "moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_pad_uneven_dispatch_inputs "
        "moe_permute_fusion_into_hybridep moe_router_quantile_balancing_ema",
        "they act on the layers around attention",
    ),
    outside("moe_router_pre_softmax", "it acts on the layers around attention", recipe="key"),
    outside("autocast_dtype", "the dtype of autocast"),
    outside(
        "variable_seq_lengths", "it sizes the pipeline's transfers; attention makes a plan for each shape"
    ),
    outside("use_te_rng_tracker inference_rng_tracker", "they track random states outside of attention"),
    refused(
        "heterogeneous_block_specs",
        "gpt_layer_spec is one specification for all layers",
        launcher="outside",
        remedy="Put LightSeqCoreAttention into the specifications of your own layers",
    ),
    outside("hetereogenous_dist_checkpoint", "it concerns checkpoints"),
    outside(
        "fp8",
        "it concerns linear layers: attention gets fp32, bf16 or fp16",
        recipe=instead(f"Recipes train in fp32 or bf16; {IN_LAUNCHER} for linear layers"),
    ),
    outside(
        "fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval fp8_wgrad fp8_amax_history_len "
        "fp8_amax_compute_algo fp8_output_proj activation_func_fp8_input_store quant_recipe fp4 fp4_recipe fp4_param "
        "fp4_quantizer_factory use_kitchen kitchen_attention_backend moe_router_padding_for_fp8 "
        "moe_router_padding_for_quantization",
        "it concerns linear layers: attention gets fp32, bf16 or fp16",
    ),
    outside(
        "dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss "
        "dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_rope_interleaved "
        "dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 "
        "dsa_kernel_backend experimental_attention_variant_loss_scale_func",
        "read with other attentions, which are refused",
    ),
    outside(
        "linear_attention_freq linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads "
        "linear_num_value_heads",
        "read by gated delta nets: hybrid_block_spec builds ours, and Megatron's own are refused",
        recipe="key",
    ),
    outside(
        "is_hybrid_model mamba_head_dim mamba_num_heads gdp_num_chunk_states_to_recompute",
        "they concern layers without attention, which adopt_layout refuses on layouts other than zigzag",
    ),
    # Inference.
    refused(
        "flash_decode batch_invariant_mode cache_mla_latents",
        "attention is for training and evaluation, not for generation",
        remedy="Set it in inference only, with Megatron's own attention (cp_method megatron)",
    ),
    outside(
        "inference_sampling_seed use_inference_optimized_layers inference_fuse_tp_communication "
        "inference_disable_triton_nvls_kernels inference_grouped_gemm_backend "
        "inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type "
        "moe_pad_experts_for_cuda_graph_inference batch_invariant_backend",
        "read by inference engines, whose calls are refused",
    ),
)
"""Fields of TransformerConfig and MLATransformerConfig that touch attention."""

ARGUMENTS: tuple[Option, ...] = (
    honoured("config layer_number attn_mask_type softmax_scale cp_comm_type", "", kind="constructor"),
    honoured(
        "pg_collection model_comm_pgs", "the context-parallel group is taken from it", kind="constructor"
    ),
    refused(
        "attention_type",
        "queries, keys and values come from one sequence",
        kind="constructor",
        harmless=("self",),
    ),
    refused(
        "attention_dropout",
        "attention probabilities are never stored, so none can be dropped",
        kind="constructor",
        harmless=(0, None),
        remedy="Set attention_dropout to 0 to train without it, or keep it with Megatron's own attention "
        "(cp_method megatron)",
    ),
    outside("k_channels v_channels", "read from the shapes of q, k and v", kind="constructor"),
    refused(
        "num_splits",
        "it tunes a kernel that is not used",
        kind="constructor",
        remedy="Leave num_splits out: results do not depend on it",
    ),
    honoured("query key value", "", kind="forward"),
    honoured("attn_mask_type", "causal and no_mask; others are refused", kind="forward"),
    honoured(
        "attention_mask",
        "masks that are causal in effect, sliding windows, and documents packed alike in every sequence of the "
        "micro-batch; others are refused",
        kind="forward",
    ),
    refused("attention_bias", "scores are never stored, so nothing can be added to them", kind="forward"),
    honoured(
        "packed_seq_params",
        "documents in format thd, wherever they end: whole sequences are cut by the layout; the groups per micro-batch "
        "of hybrid context parallelism (local_cp_size, cp_group) are refused",
        kind="forward",
    ),
    refused(
        "num_splits",
        "it tunes a kernel that is not used",
        kind="forward",
        remedy="Leave num_splits out: results do not depend on it",
    ),
)
"""Arguments with which Megatron-Core builds and calls core_attention."""

LAUNCHER: tuple[Option, ...] = (
    row(
        "use_flash_attn",
        "the attention kernel is chosen by cp_kernel",
        launcher="replaced",
        harmless=(False, None),
        recipe=instead("Use cp_kernel: flash_attn, or auto for our own kernels"),
    ),
    launcher_row(
        "reset_attention_mask",
        "attention follows the masks of the data loader, which must reach every layer and be the same for the whole "
        "micro-batch",
        condition=LOST_DOCUMENTS,
        recipe="key",
    ),
    launcher_row("sft", _PACKED, recipe="key"),
    launcher_row(
        "dataloader_inter_document_masking",
        _PACKED,
        recipe=instead("Use reset_attention_mask and reset_position_ids"),
    ),
    launcher_row("use_legacy_models heterogeneous_layers_config_path", _OWN_LAYERS),
    launcher_row(
        "mla_down_proj_fusion",
        "part of the gradient of the keys that all heads share would be lost",
        condition=TENSOR_PARALLEL,
        remedy="Leave it out: the projections compute the same unfused",
    ),
    launcher_row(
        "recompute_modules",
        "a sliced MLP recomputes each slice, and would be recomputed once more as a module",
        only=("mlp",),
        condition=SLICED_MLP,
        remedy="Leave mlp out of recompute_modules, or leave mlp_tile_tokens out",
    ),
    launcher_row(
        "tp_comm_overlap",
        "its buffers hold a whole micro-batch, and slices are shorter",
        condition=SLICED_MLP,
        remedy="Leave tp_comm_overlap or mlp_tile_tokens out",
    ),
    launcher_row(
        "num_experts",
        "only dense MLPs are computed in slices",
        condition=SLICED_MLP,
        remedy="Leave mlp_tile_tokens out; loss_tile_tokens works with experts",
        recipe="key",
    ),
    launcher_row(
        "use_mup defer_embedding_wgrad_compute mtp_num_layers",
        _OWN_LOGITS,
        condition=SLICED_LOSS,
        remedy="Leave loss_tile_tokens out",
    ),
)
"""Arguments of Megatron-LM that only its command line has, or that slices refuse."""

OPTIONS = (*ATTENTION, *ARGUMENTS, *LAUNCHER, *RECIPE)
"""The table. A name may have several rows, for several places or conditions."""

_OWN_PROGRAM = "Use it in a program of your own with gpt_layer_spec, or with lightseq megatron-lm"


def attention_options(kind: Kind) -> dict[str, Option]:
    """What attention does with each field of Megatron's configuration, or with each argument."""
    return {
        name: option
        for option in OPTIONS
        if option.attention and option.kind == kind
        for name in option.names
    }


def launcher_options() -> Iterator[tuple[str, Option]]:
    """What the launcher refuses or replaces; a field that attention refuses is refused as a flag."""
    for option in OPTIONS:
        if option.kind == "field" and option.in_launcher in ("refused", "replaced"):
            yield from ((name, option) for name in option.names)


def recipe_spellings() -> dict[str, Spelling]:
    """What Megatron's options that are not keys of ours mean in a recipe."""
    found: dict[str, Spelling] = {}
    for option in (option for option in OPTIONS if option.kind == "field"):
        for name in option.names:
            if isinstance(option.recipe, Spelling):
                found[name] = option.recipe
            elif option.recipe is None and option.attention is not None:
                found.setdefault(name, _derived(option))
    keys = {name for option in OPTIONS if option.recipe == "key" for name in option.names}
    return {name: spelling for name, spelling in found.items() if name not in keys}


def _derived(option: Option) -> Spelling:
    if option.attention in ("refused", "replaced"):
        return instead(f"Leave it out: LightSeq attention does not support it, because {option.reason}")
    return instead(_OWN_PROGRAM)
