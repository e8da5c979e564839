"""Every rule has one configuration that breaks it, and only it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from megatron_lightseq.config import Machine, PretrainConfig, rules, validate, violations, with_values
from megatron_lightseq.config.flat import keys
from megatron_lightseq.config.rules import Rule, RuleSet
from megatron_lightseq.config.rules_run import split_shares
from megatron_lightseq.config.typed import key_types
from megatron_lightseq.errors import ConfigError

GOOD = with_values(PretrainConfig(), data_path=("corpus",))

YARN = {
    "position_embedding_type": "yarn",
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 1024,
}

LORA = {"lora_dim": 8, "load": "checkpoints"}

DELTA_NETS = {"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": 4}

CASES: dict[str, tuple[dict[str, Any], Machine, str]] = {
    # rule: (values, machine, what the message must say)
    "hidden_size_divides_by_heads": (
        {"hidden_size": 260},
        Machine(),
        "a hidden_size that is a multiple of 8",
    ),
    "heads_divide_by_query_groups": (
        {"num_query_groups": 3},
        Machine(),
        "Use a num_query_groups that divides 8",
    ),
    "rotary_dimension_is_even": ({"kv_channels": 31}, Machine(), "Use an even head dimension"),
    "positions_reach_seq_length": ({"max_position_embeddings": 4095}, Machine(), "at least 4096"),
    "activation_is_named_once": ({"squared_relu": True}, Machine(), "set swiglu to false"),
    "gate_options_need_a_gate": (
        {"swiglu": False, "activation_func_clamp_value": 7.0},
        Machine(),
        "Use a gated MLP",
    ),
    "window_pattern_fits": (
        {"window_size": (8, 0), "window_attn_skip_freq": (1, 0)},
        Machine(),
        "4 entries of 0 or 1",
    ),
    "no_rope_pattern_fits": ({"no_rope_freq": 0}, Machine(), "Write a number of 1 or more"),
    "expert_pattern_fits": (
        {"num_experts": 4, "moe_layer_freq": (0, 1, 2, 1)},
        Machine(),
        "moe_layer_freq [0, 1, 2, 1]",
    ),
    "window_is_causal": ({"window_size": (8, 1)}, Machine(), "Write, for example, window_size: [1023, 0]"),
    "skipped_windows_are_there": (
        {"window_size": (8, 0), "window_attn_skip_freq": 1},
        Machine(),
        "a window_attn_skip_freq of 2 or more",
    ),
    "megatrons_sinks_are_whole": (
        {"softmax_type": "learnable", "cp_method": "megatron", "tensor_model_parallel_size": 2},
        Machine(has_transformer_engine=False),
        "Set tensor_model_parallel_size to 1, or choose another cp_method",
    ),
    "rope_keys_need_rope": (
        {"position_embedding_type": "none", "no_rope_freq": 2},
        Machine(),
        "Set position_embedding_type to rope",
    ),
    "yarn_keys_need_yarn": ({"yarn_beta_fast": 16.0}, Machine(), "Set position_embedding_type to yarn"),
    "yarn_knows_its_context": (
        {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0},
        Machine(),
        "and yarn_original_max_position_embeddings",
    ),
    "yarn_scales_are_given_together": ({**YARN, "yarn_mscale": 1.0}, Machine(), "Set both, or neither"),
    "yarn_rotates_halves": ({**YARN, "rotary_interleaved": True}, Machine(), "rotary_interleaved to false"),
    "rope_is_scaled_once": ({**YARN, "use_rope_scaling": True}, Machine(), "Keep one of them"),
    "rope_scaling_factor_is_used": ({"rope_scaling_factor": 32.0}, Machine(), "use_rope_scaling to true"),
    "local_base_has_windows": ({"rotary_base_local": 10000.0}, Machine(), "Set window_size"),
    "latent_attention_scales_with_yarn": (
        {"multi_latent_attention": True, "use_rope_scaling": True},
        Machine(),
        "scale with rotary_scaling_factor",
    ),
    "latent_rope_needs_latent_attention": ({"mscale": 0.7}, Machine(), "with the yarn_* keys"),
    "latent_yarn_extends": (
        {"multi_latent_attention": True, "rope_type": "yarn"},
        Machine(),
        "Set rotary_scaling_factor above 1",
    ),
    "original_context_is_used": (
        {"original_max_position_embeddings": 2048},
        Machine(),
        "Set rope_type to longrope",
    ),
    "longrope_has_factors": ({"rope_type": "longrope"}, Machine(), "longrope with both lists"),
    "longrope_factors_fit": (
        {"rope_type": "longrope", "longrope_short_factor": (1.0,), "longrope_long_factor": (1.0,) * 16},
        Machine(),
        "one positive number for each pair",
    ),
    "scores_are_scaled_once": (
        {"softmax_scale": 0.1, "query_pre_attn_scalar": 100.0},
        Machine(),
        "Keep one of them",
    ),
    "queries_are_normalised_once": (
        {"qk_layernorm": True, "qk_l2_norm": True},
        Machine(),
        "Keep one of them",
    ),
    "latent_attention_is_plain": (
        {"multi_latent_attention": True, "add_qkv_bias": True},
        Machine(),
        "or multi_latent_attention",
    ),
    "temperature_needs_layers_without_rope": (
        {"attn_temperature_tuning": True},
        Machine(),
        "attn_temperature_tuning and no_rope_freq",
    ),
    "megatrons_scores_are_plain": (
        {"cp_method": "megatron", "attn_logit_softcapping": 50.0},
        Machine(),
        "Choose another cp_method",
    ),
    "latent_keys_need_latent_attention": (
        {"kv_lora_rank": 16},
        Machine(),
        "Set multi_latent_attention to true",
    ),
    "latent_attention_has_no_groups": (
        {"multi_latent_attention": True, "num_query_groups": 2},
        Machine(),
        "Remove num_query_groups and kv_channels",
    ),
    "latent_attention_uses_rope": (
        {"multi_latent_attention": True, "position_embedding_type": "none"},
        Machine(),
        "position_embedding_type to rope",
    ),
    "latent_vectors_divide_by_tensor_parallel": (
        {"multi_latent_attention": True, "kv_lora_rank": 33, "tensor_model_parallel_size": 2},
        Machine(),
        "Change them to multiples of 2",
    ),
    "mtp_loss_needs_layers": ({"mtp_loss_scaling_factor": 0.3}, Machine(), "Set mtp_num_layers"),
    "mtp_learns_no_positions": (
        {"mtp_num_layers": 1, "position_embedding_type": "learned_absolute"},
        Machine(),
        "Set position_embedding_type to rope or none",
    ),
    "mtp_recomputes_uniformly": (
        {
            "mtp_num_layers": 1,
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": 1,
        },
        Machine(),
        "Set recompute_method to uniform and recompute_num_layers to 1",
    ),
    "expert_keys_need_experts": ({"moe_router_topk": 1}, Machine(), "Set num_experts, or remove"),
    "topk_is_within_experts": (
        {"num_experts": 4, "moe_router_topk": 5},
        Machine(),
        "Use a moe_router_topk of at most 4",
    ),
    "experts_divide_by_expert_parallel": (
        {"num_experts": 4, "expert_model_parallel_size": 3},
        Machine(),
        "a num_experts that is a multiple of 3",
    ),
    "world_size_holds_experts": (
        {"num_experts": 4, "expert_model_parallel_size": 4},
        Machine(world_size=1),
        "Lower expert_model_parallel_size, or start more ranks",
    ),
    "expert_copies_are_replicas": (
        {
            "num_experts": 4,
            "expert_tensor_parallel_size": 1,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
        },
        Machine(),
        "the copies would drift apart",
    ),
    "experts_need_sequence_parallel": (
        {"num_experts": 4, "tensor_model_parallel_size": 2},
        Machine(),
        "the router sees every token exactly once only if sequence_parallel is on",
    ),
    "experts_divide_by_tensor_parallel": (
        {
            "num_experts": 4,
            "moe_ffn_hidden_size": 65,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 2,
        },
        Machine(),
        "Change moe_ffn_hidden_size to such a multiple",
    ),
    "shared_expert_divides_by_tensor_parallel": (
        {
            "num_experts": 4,
            "moe_shared_expert_intermediate_size": 65,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
        },
        Machine(),
        "a moe_shared_expert_intermediate_size that is a multiple of 2",
    ),
    "expert_biases_are_added_once": (
        {"num_experts": 4, "add_bias_linear": True, "moe_shared_expert_intermediate_size": 64},
        Machine(),
        "Set add_bias_linear to false",
    ),
    "some_layer_has_experts": (
        {"num_experts": 4, "moe_layer_freq": (0, 0, 0, 0)},
        Machine(),
        "Put a 1 into moe_layer_freq",
    ),
    "single_expert_has_a_weight": (
        {"num_experts": 4, "moe_router_topk": 1, "moe_router_pre_softmax": False},
        Machine(),
        "Set moe_router_pre_softmax to null or true",
    ),
    "expert_groups_are_limited": (
        {"num_experts": 4, "moe_router_num_groups": 2},
        Machine(),
        "Set both, or neither",
    ),
    "expert_groups_hold_the_chosen": (
        {"num_experts": 4, "moe_router_num_groups": 3, "moe_router_group_topk": 1},
        Machine(),
        "Use groups that divide num_experts",
    ),
    "expert_bias_needs_sigmoid": (
        {"num_experts": 4, "moe_router_enable_expert_bias": True},
        Machine(),
        "true with sigmoid scores",
    ),
    "input_has_one_weight": (
        {"num_experts": 4, "moe_apply_probs_on_input": True},
        Machine(),
        "Set moe_router_topk to 1",
    ),
    "shared_gate_has_an_expert": (
        {"num_experts": 4, "moe_shared_expert_gate": True},
        Machine(),
        "Set moe_shared_expert_intermediate_size",
    ),
    "aux_loss_has_a_type": (
        {"num_experts": 4, "moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "none"},
        Machine(),
        "to aux_loss or seq_aux_loss",
    ),
    "grouped_gemm_needs_transformer_engine": (
        {"num_experts": 4, "moe_grouped_gemm": True},
        Machine(has_transformer_engine=False),
        "Set moe_grouped_gemm to false",
    ),
    "experts_are_not_recomputed_as_mlp": (
        {"num_experts": 4, "recompute_granularity": "selective", "recompute_modules": ("mlp",)},
        Machine(),
        "Remove mlp from recompute_modules",
    ),
    "linear_pattern_fits": (
        {"experimental_attention_variant": "linear", "linear_attention_freq": (1, 0)},
        Machine(),
        "4 entries of 0 or 1",
    ),
    "linear_layers_are_somewhere": (
        {"experimental_attention_variant": "linear", "linear_attention_freq": 1},
        Machine(),
        "so that one layer or more is linear",
    ),
    "widths_are_of_delta_nets": (
        {"experimental_attention_variant": "linear", "linear_attention_freq": 2, "linear_key_head_dim": 64},
        Machine(),
        "experimental_attention_variant to gated_delta_net",
    ),
    "scans_are_of_linear_layers": (
        {"cp_linear_scan": "doubling"},
        Machine(),
        "cp_linear_scan doubling",
    ),
    "linear_kernel_supports_device": (
        {**DELTA_NETS, "cp_linear_kernel": "cpu"},
        Machine(num_gpus=1),
        "Set cp_linear_kernel to auto",
    ),
    "linear_heads_divide": ({**DELTA_NETS, "linear_num_value_heads": 24}, Machine(), "Choose multiples"),
    "linear_layers_hold_adjacent_tokens": (
        {**DELTA_NETS, "cp_method": "zigzag", "context_parallel_size": 2},
        Machine(),
        "Use cp_method lightseq, whose layout is contiguous",
    ),
    "convolution_fits_a_shard": (
        {**DELTA_NETS, "linear_conv_kernel_dim": 5000},
        Machine(),
        "Use fewer ranks, or longer sequences",
    ),
    "linear_attention_is_plain": (
        {
            "experimental_attention_variant": "linear",
            "linear_attention_freq": 2,
            "multi_latent_attention": True,
        },
        Machine(),
        "Use gated_delta_net, or plain attention",
    ),
    "world_size_is_product": (
        {"context_parallel_size": 2},
        Machine(world_size=3),
        "context_parallel_size 2, world size 3: world size 3 with tensor 1 * pipeline 1 * context 2 = 2: "
        "the world size must be a multiple of the product of the parallel sizes. Start 2 ranks",
    ),
    "heads_divide_by_tensor_parallel": (
        {"tensor_model_parallel_size": 3, "ffn_hidden_size": 600, "num_query_groups": 1},
        Machine(),
        "Use a tensor_model_parallel_size that divides 8",
    ),
    "query_groups_fit_tensor_parallel": (
        {
            "num_attention_heads": 12,
            "hidden_size": 384,
            "num_query_groups": 3,
            "tensor_model_parallel_size": 2,
        },
        Machine(),
        "num_query_groups 2 or a multiple",
    ),
    "ffn_divides_by_tensor_parallel": (
        {"ffn_hidden_size": 601, "tensor_model_parallel_size": 2},
        Machine(),
        "Set ffn_hidden_size to a multiple of 2",
    ),
    "layers_divide_by_pipeline": (
        {"pipeline_model_parallel_size": 3},
        Machine(),
        "a num_layers that is a multiple of 3",
    ),
    "virtual_pipeline_needs_pipeline": (
        {"num_layers_per_virtual_pipeline_stage": 1},
        Machine(),
        "needs pipeline_model_parallel_size > 1",
    ),
    "layers_divide_by_virtual_stages": (
        {"num_layers_per_virtual_pipeline_stage": 2, "pipeline_model_parallel_size": 2},
        Machine(),
        "two or more virtual stages of equal size",
    ),
    "virtual_pipeline_divides_micro_batches": (
        {
            "num_layers_per_virtual_pipeline_stage": 1,
            "pipeline_model_parallel_size": 2,
            "global_batch_size": 3,
        },
        Machine(world_size=2),
        "micro-batches per step that is a multiple of pipeline_model_parallel_size",
    ),
    "sequence_parallel_needs_tensor_parallel": (
        {"sequence_parallel": True},
        Machine(),
        "Remove sequence_parallel",
    ),
    "sequence_parallel_divides_seq_length": (
        {
            "sequence_parallel": True,
            "tensor_model_parallel_size": 2,
            "context_parallel_size": 2,
            "seq_length": 4098,
        },
        Machine(),
        "must be a multiple of context_parallel_size * tensor_model_parallel_size",
    ),
    "param_gather_needs_sharding": (
        {"overlap_param_gather": True, "use_distributed_optimizer": True},
        Machine(),
        "overlap_grad_reduce false",
    ),
    "distributed_optimizer_is_adam": (
        {"use_distributed_optimizer": True, "optimizer": "sgd"},
        Machine(),
        "supports only Adam",
    ),
    "nccl_needs_gpus": (
        {"distributed_backend": "nccl"},
        Machine(num_gpus=0),
        "distributed_backend to auto or gloo",
    ),
    "layout_divides_seq_length": (
        {"context_parallel_size": 4, "cp_method": "zigzag", "seq_length": 4100},
        Machine(),
        "seq_length 4100, context_parallel_size 4, cp_method zigzag, cp_layout auto: seq_length 4100 over cp_size 4: "
        "the zigzag layout needs a multiple of 2 x cp_size = 8",
    ),
    "method_accepts_layout": (
        {"cp_layout": "zigzag"},
        Machine(),
        "cp_method lightseq, cp_layout zigzag, context_parallel_size 1: method 'lightseq' on the zigzag layout: ",
    ),
    "network_is_for_auto": ({"cp_network": "nvlink"}, Machine(), "Remove it, or set cp_method to auto"),
    "network_is_known": (
        {"cp_network": "link=fast", "cp_method": "auto"},
        Machine(),
        "numbers: link=450GB/s, latency=5us",
    ),
    "ulysses_size_is_for_usp": ({"cp_ulysses_size": 1}, Machine(), "Remove it, or set cp_method to usp"),
    "ulysses_size_divides": (
        {"cp_method": "usp", "cp_ulysses_size": 3, "context_parallel_size": 4},
        Machine(),
        "the group size (cp_ulysses_size) divides the number of ranks",
    ),
    "comm_type_is_one_or_one_per_layer": (
        {"cp_comm_type": ("p2p", "a2a")},
        Machine(),
        "one value for all layers, or one value per layer",
    ),
    "comm_type_is_not_for_megatron": (
        {"cp_method": "megatron", "cp_comm_type": ("a2a",)},
        Machine(),
        "which cp_method megatron does not use",
    ),
    "full_rows_need_no_kernel": (
        {"cp_method": "rsa", "cp_kernel": "cpu"},
        Machine(),
        "cp_method rsa, cp_kernel cpu: this cp_method computes full rows of scores without a kernel",
    ),
    "invariant_attention_is_ours": (
        {"cp_invariant": 64, "cp_method": "auto"},
        Machine(),
        "cp_invariant 64, cp_method auto, cp_kernel auto: cp_invariant fixes the order of all sums",
    ),
    "verified_transport_is_ours": (
        {"cp_verify_transport": True, "cp_method": "megatron"},
        Machine(),
        "cp_verify_transport adds checksums to this package's messages",
    ),
    "invariant_chunks_divide_the_sequence": (
        {"cp_invariant": 1024, "seq_length": 4096, "context_parallel_size": 4},
        Machine(),
        "in parts of 512: every part is made of whole chunks",
    ),
    "megatron_method_is_zigzag": (
        {"cp_method": "megatron", "cp_layout": "contiguous"},
        Machine(),
        "uses Megatron's own zigzag layout",
    ),
    "megatron_method_needs_transformer_engine": (
        {"cp_method": "megatron", "context_parallel_size": 2},
        Machine(has_transformer_engine=False),
        "supports context parallelism only with Transformer Engine",
    ),
    "attention_has_no_dropout": ({"attention_dropout": 0.1}, Machine(), "Set attention_dropout to 0"),
    "kernel_supports_model": (
        {"cp_kernel": "flash_attn"},
        Machine(),
        "kernel flash_attn: it takes bfloat16 or float16, not float32. Set cp_kernel to auto",
    ),
    "kernel_supports_device": (
        {"cp_kernel": "cuda", "bf16": True, "kv_channels": 64},
        Machine(num_gpus=0),
        "num gpus 0: kernel cuda: it takes tensors on a CUDA device only",
    ),
    "flash_attn_is_installed": (
        {"cp_kernel": "flash_attn", "bf16": True},
        Machine(num_gpus=1, has_flash_attn=False),
        "Install flash-attn",
    ),
    "megatron_method_has_no_kernel": (
        {"cp_method": "megatron", "cp_kernel": "reference"},
        Machine(),
        "which does not run on the kernels of this package",
    ),
    "full_recompute_names_layers": (
        {"recompute_granularity": "full", "recompute_method": "block"},
        Machine(),
        "Set recompute_method to uniform and recompute_num_layers to 1",
    ),
    "layers_belong_to_full_recompute": (
        {"recompute_num_layers": 1},
        Machine(),
        "apply only to full recompute",
    ),
    "recompute_fits_stage": (
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 5},
        Machine(),
        "must not exceed the number of layers per pipeline stage",
    ),
    "selective_recompute_names_modules": (
        {"recompute_granularity": "selective", "recompute_modules": ("mlp", "mlp")},
        Machine(),
        "each listed once",
    ),
    "layernorm_recompute_needs_transformer_engine": (
        {"recompute_granularity": "selective", "recompute_modules": ("layernorm",)},
        Machine(has_transformer_engine=False),
        "needs Transformer Engine to recompute a layernorm",
    ),
    "mlp_tiles_are_dense": (
        {"mlp_tile_tokens": 512, "num_experts": 4},
        Machine(),
        "mlp_tile_tokens 512, num_experts 4: mlp_tile_tokens slices dense MLPs only",
    ),
    "mlp_is_recomputed_once": (
        {"mlp_tile_tokens": 512, "recompute_granularity": "selective", "recompute_modules": ("mlp",)},
        Machine(),
        "Remove mlp from recompute_modules",
    ),
    "min_lr_is_below_lr": ({"min_lr": 1.0}, Machine(), "min_lr must not exceed lr"),
    "warmup_ends_before_decay": ({"lr_warmup_iters": 100}, Machine(), "Lower lr_warmup_iters"),
    "batch_divides_by_micro_batch": (
        {"global_batch_size": 3, "micro_batch_size": 2},
        Machine(world_size=1),
        "multiple of micro_batch_size",
    ),
    "batch_divides_by_data_parallel": (
        {"global_batch_size": 4, "micro_batch_size": 2, "context_parallel_size": 2},
        Machine(world_size=6),
        "global_batch_size 4, micro_batch_size 2",
    ),
    "masked_loss_counts_tokens": (
        {"eod_mask_loss": True, "calculate_per_token_loss": False},
        Machine(),
        "Set calculate_per_token_loss to true",
    ),
    "restarted_angles_need_documents": (
        {"reset_position_ids": True},
        Machine(),
        "Set reset_attention_mask to true, or reset_position_ids to false",
    ),
    "sft_says_it_all": (
        {"sft": True, "reset_attention_mask": True},
        Machine(),
        "Remove the other three, or set sft to false",
    ),
    "answers_are_counted": (
        {"sft": True, "calculate_per_token_loss": False},
        Machine(),
        "Set calculate_per_token_loss to true",
    ),
    "megatron_packs_on_one_rank": (
        {"reset_attention_mask": True, "cp_method": "megatron", "context_parallel_size": 2},
        Machine(),
        "set context_parallel_size to 1",
    ),
    "megatron_packs_plain_layers": (
        {"reset_attention_mask": True, "cp_method": "megatron", "window_size": (8, 0)},
        Machine(),
        "Choose another cp_method",
    ),
    "rows_are_balanced_together": (
        {
            "reset_attention_mask": True,
            "micro_batch_size": 2,
            "global_batch_size": 2,
            "num_experts": 4,
            "moe_router_load_balancing_type": "seq_aux_loss",
        },
        Machine(),
        "Set micro_batch_size to 1",
    ),
    "lora_keys_need_a_rank": ({"lora_alpha": 16.0}, Machine(), "Set lora_dim"),
    "lora_targets_are_named_once": (
        {**LORA, "lora_target_modules": ("linear_qkv", "linear_qkv")},
        Machine(),
        "each once",
    ),
    "experts_have_no_adapters": (
        {**LORA, "num_experts": 4},
        Machine(),
        "Set lora_target_modules to [linear_qkv, linear_proj]",
    ),
    "adapters_are_for_softmax_attention": (
        {**LORA, "mtp_num_layers": 1},
        Machine(),
        "choose what is trained with frozen_parameters",
    ),
    "adapters_freeze_the_rest": (
        {**LORA, "frozen_parameters": ("embedding.*",)},
        Machine(),
        "Remove frozen_parameters",
    ),
    "data_is_given": ({"data_path": ()}, Machine(), "lightseq prepare-data"),
    "data_weights_alternate": ({"data_path": ("0.5", "a", "b", "c")}, Machine(), r"data_path [0.5, a, b, c]"),
    "split_is_three_shares": ({"split": "0,1,1"}, Machine(), "Write, for example, 969,30,1"),
    "evaluation_has_data": (
        {"split": "1,0,0", "eval_interval": 10},
        Machine(),
        "the validation share is 0",
    ),
    "tokenizer_model_belongs_to_hf": ({"tokenizer_type": "hf"}, Machine(), "Set tokenizer_model"),
    "eod_token_belongs_to_hf": ({"eod_token": "</s>"}, Machine(), "Set eod_token to null"),
    "null_tokenizer_gives_vocabulary": ({"tokenizer_type": "null"}, Machine(), "Set vocab_size to one more"),
    "vocabulary_holds_bytes": ({"vocab_size": 256}, Machine(), "at least 257"),
    "save_interval_needs_save": ({"save_interval": 5}, Machine(), "Set save to a folder"),
    "retained_checkpoints_are_saved": (
        {"save": "x", "save_interval": 5, "save_retain_interval": 12},
        Machine(),
        "Use a multiple of save_interval",
    ),
    "kept_checkpoints_are_several": ({"save": "x", "save_keep_last": 2}, Machine(), "Set save_interval"),
    "load_iteration_needs_load": ({"load_iteration": 5}, Machine(), "Set load to a folder of checkpoints"),
    "resume_needs_save": ({"resume": "auto"}, Machine(), "Set save to a folder"),
    "finetune_needs_load": ({"finetune": True}, Machine(), "Set load to a checkpoint folder"),
    "trained_parts_need_a_model": (
        {"frozen_parameters": ("embedding.*",)},
        Machine(),
        "Set load to a checkpoint",
    ),
    "rollback_needs_checkpoints": (
        {"on_loss_spike": "rollback", "save": "runs/a"},
        Machine(),
        "rollback returns to a checkpoint that this run has saved on its way",
    ),
    "wandb_run_belongs_to_a_project": ({"wandb_exp_name": "long"}, Machine(), "Set wandb_project"),
    "traced_steps_are_taken": ({"trace": "t", "train_iters": 3}, Machine(), "Choose steps of the run"),
    "steps_belong_to_a_trace": ({"trace_step_end": 5}, Machine(), "Set trace to a folder"),
}


def _bounds_case(rule: Rule) -> tuple[dict[str, Any], str]:
    (key,) = rule.keys
    value = float("nan") if key == "glu_linear_offset" else -1  # which may have either sign
    return {key: value}, f"{key} {value}: {key} must be "


def test_every_rule_has_a_case_and_every_case_a_rule() -> None:
    relations = [rule.name for rule in rules() if not rule.name.endswith("_in_bounds")]
    assert relations == list(CASES)
    assert len(rules()) == len(CASES) + sum(rule.name.endswith("_in_bounds") for rule in rules())


@pytest.mark.parametrize("name", CASES)
def test_case_breaks_its_rule_and_no_other(name: str) -> None:
    values, machine, text = CASES[name]
    found = violations(with_values(GOOD, **values), machine)
    assert len(found) == 1, found
    assert text in found[0]
    rule = next(rule for rule in rules() if rule.name == name)
    assert str(rule.complaint(with_values(GOOD, **values), machine)) in found[0]
    assert "{" not in found[0], "the remedy must contain values, not placeholders"
    assert all(key in found[0] for key in rule.keys)


@pytest.mark.parametrize(
    "rule", [rule for rule in rules() if rule.name.endswith("_in_bounds")], ids=lambda r: r.name
)
def test_value_out_of_bounds_is_the_only_message(rule: Rule) -> None:
    values, text = _bounds_case(rule)
    found = violations(with_values(GOOD, **values), Machine(world_size=1, num_gpus=0))
    assert len(found) == 1, found
    assert text in found[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_every_number_refuses_what_is_not_finite(value: float) -> None:
    numbers = [key for key in keys() if key_types()[key] in (float, float | None)]
    assert len(numbers) >= 10
    for key in numbers:
        assert violations(with_values(GOOD, **{key: value})), key


def test_every_number_has_bounds() -> None:
    numbers = {key for key in keys() if key_types()[key] in (int, int | None, float, float | None)}
    assert numbers == {rule.keys[0] for rule in rules() if rule.name.endswith("_in_bounds")}


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_default_configuration_breaks_no_rule(world_size: int) -> None:
    config = with_values(GOOD, global_batch_size=world_size)
    validate(config, Machine(world_size=world_size, num_gpus=0, has_transformer_engine=False))


def test_all_violations_come_in_one_report() -> None:
    values: Mapping[str, Any] = {
        "hidden_size": 260,
        "min_lr": 1.0,
        "split": "x",
        "cp_layout": "zigzag",
        "lr": 0.5,
    }
    with pytest.raises(ConfigError) as caught:
        validate(with_values(GOOD, **values))
    message = str(caught.value)
    assert message.startswith("4 problems in the configuration:\n1. hidden_size 260")
    assert [line.split(".")[0] for line in message.splitlines()[1:]] == ["1", "2", "3", "4"]


def test_both_numbers_are_named_when_the_world_is_no_product() -> None:
    config = with_values(GOOD, tensor_model_parallel_size=2, context_parallel_size=2)
    (message,) = violations(config, Machine(world_size=6))
    for part in ("tensor_model_parallel_size 2", "context_parallel_size 2", "world size 6"):
        assert part in message


def test_rules_that_need_unknown_facts_are_skipped() -> None:
    config = with_values(
        GOOD,
        context_parallel_size=2,
        cp_kernel="cuda",
        bf16=True,
        kv_channels=64,
        distributed_backend="nccl",
    )
    assert violations(config) == []
    assert len(violations(config, Machine(world_size=3, num_gpus=0))) == 3


def test_a_set_refuses_two_rules_of_one_name() -> None:
    rule = rules()[0]
    with pytest.raises(AssertionError, match="two rules are named"):
        RuleSet([rule, rule])


def test_a_second_look_checks_only_what_it_has_learned() -> None:
    """Rules are checked first without torch, then with the number of GPUs. Every rule is checked once."""
    config = with_values(GOOD, distributed_backend="nccl", min_lr=1.0, lr=0.5, num_layers=0)
    before, now = Machine(world_size=1), Machine(world_size=1, num_gpus=0)
    first, second = violations(config, before), violations(config, now, checked=before)
    assert sorted([*first, *second]) == sorted(violations(config, now))
    assert len(second) == 1
    assert "this host has none" in second[0]


KERNEL_REFUSALS: dict[str, tuple[dict[str, Any], Machine, str]] = {
    "windows on several ranks": (
        {"window_size": (8, 0), "cp_kernel": "flash_attn", "context_parallel_size": 2, "bf16": True},
        Machine(),
        "it supports sliding windows on one context-parallel rank only, not on 2",
    ),
    "documents": (
        {"cp_kernel": "flash_attn", "reset_attention_mask": True, "bf16": True},
        Machine(),
        "it does not support packed documents",
    ),
    "stripes": (
        {"cp_kernel": "sdpa", "cp_method": "ring", "cp_layout": "striped", "context_parallel_size": 2},
        Machine(num_gpus=0),
        "causal tiles without their diagonal, which striped layouts have",
    ),
    "host memory over nccl": (
        {"cp_kernel": "cpu", "distributed_backend": "nccl"},
        Machine(),
        "cp_kernel cpu, bf16 false, kv_channels null, window_size [], reset_attention_mask false, sft false, "
        "attn_logit_softcapping null, cp_method lightseq, cp_layout auto, "
        "context_parallel_size 1, distributed_backend nccl: kernel cpu: it takes tensors on the CPU only",
    ),
    "a head dim": ({"cp_kernel": "cuda", "bf16": True, "kv_channels": 48}, Machine(), "not 48"),
    "a dtype on the device that is there": (
        {"cp_kernel": "sdpa"},
        Machine(num_gpus=1),
        "it takes bfloat16 or float16, not float32",
    ),
}


@pytest.mark.parametrize("name", KERNEL_REFUSALS)
def test_what_a_kernel_does_not_support_is_said_once(name: str) -> None:
    values, machine, text = KERNEL_REFUSALS[name]
    (found,) = violations(with_values(GOOD, **values), machine)
    assert text in found


@pytest.mark.parametrize(
    ("split", "shares"),
    [
        ("969,30,1", (0.969, 0.03, 0.001)),
        ("1, 1, 2", (0.25, 0.25, 0.5)),
        ("1,1", None),
        ("1,1,1,1", None),
        ("-1,1,1", None),
        ("0,0,0", None),
        ("a,b,c", None),
        ("nan,1,1", None),
        ("inf,1,1", None),
        ("", None),
    ],
)
def test_split_shares(split: str, shares: tuple[float, ...] | None) -> None:
    assert split_shares(split) == (None if shares is None else pytest.approx(shares))
