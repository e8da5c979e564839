"""Arguments of Megatron-LM that have nothing to do with attention, and are written otherwise in recipes.

Rows of the table in megatron_options.py. Standard library only.
"""

from __future__ import annotations

from megatron_lightseq.config.megatron_option import (
    IN_LAUNCHER,
    ROUTING,
    Option,
    Spelling,
    instead,
    means,
    row,
)

_FUSION = "Remove it: fusions are used where the machine has them"
_STEPS = "Count in steps of global_batch_size: "
_LOGS = "Remove it: reports go to tensorboard_dir and report_dir"
_RANKS = "Remove it: the size of the world comes from torchrun, and data parallel size is what remains of it"
_TOKENIZER = "Use tokenizer_type: hf with tokenizer_model, a `tokenizers` JSON file"

RECIPE: tuple[Option, ...] = (
    row("disable_bias_linear", recipe=means(add_bias_linear=False)),
    row("use_rotary_position_embeddings", recipe=means(position_embedding_type="rope")),
    row("recompute_activations", recipe=means(recompute_granularity="selective")),
    row("group_query_attention", recipe=Spelling(needs="num_query_groups")),
    row("use_mcore_models", recipe=Spelling()),
    *(
        row(names, recipe=instead(remedy))
        for names, remedy in (
            (
                "overlap_p2p_comm no_overlap_p2p_communication",
                "Remove it: the interleaved pipeline always overlaps its transfers, and the plain one never does",
            ),
            ("layernorm_epsilon", "Use norm_epsilon"),
            ("no_position_embedding", "Use position_embedding_type: rope or none"),
            ("layernorm_zero_centered_gamma", "Use apply_layernorm_1p"),
            ("quick_gelu", "Use quick_geglu, or activation_func: quick_gelu"),
            ("openai_gelu", "Use activation_func: gelu_tanh with swiglu: false"),
            ("fp16", "Use bf16, which needs no loss scaling"),
            ("loss_scale initial_loss_scale", "Remove it: bf16 needs no loss scaling"),
            ("fp8_format", f"Recipes train in fp32 or bf16; {IN_LAUNCHER} for linear layers"),
            ("train_samples", _STEPS + "use train_iters"),
            ("lr_decay_samples", _STEPS + "use lr_decay_iters"),
            ("lr_warmup_samples lr_warmup_fraction", _STEPS + "use lr_warmup_iters"),
            ("rampup_batch_size", f"Use a constant global_batch_size; {IN_LAUNCHER}"),
            ("exit_interval", "Use train_iters, with lr_decay_iters for the schedule's length"),
            ("exit_signal_handler", "Remove it: SIGTERM and Ctrl-C always save and exit"),
            ("num_virtual_stages_per_pipeline_rank", "Use num_layers_per_virtual_pipeline_stage"),
            ("spec", "Use megatron_lightseq.gpt_layer_spec in a program of your own"),
            ("use_cpu_initialization", "Remove it: initial weights are the same on every device"),
            (
                "no_rope_fusion no_gradient_accumulation_fusion no_masked_softmax_fusion no_bias_gelu_fusion "
                "no_bias_swiglu_fusion no_bias_dropout_fusion no_persist_layer_norm cross_entropy_loss_fusion "
                "moe_permute_fusion",
                _FUSION,
            ),
            ("no_create_attention_mask_in_dataloader", "Remove it: attention masks are never materialised"),
            (
                "hybrid_layer_pattern hybrid_override_pattern hybrid_attention_ratio mamba_state_dim mamba_num_groups",
                f"In recipes every layer has attention; {IN_LAUNCHER}, on layout zigzag",
            ),
            ("num_moe_experts", "Use num_experts"),
            ("moe_pad_expert_input_to_capacity moe_router_topk_limited_devices", ROUTING),
            ("moe_input_jitter_eps", f"Recipes route without noise; {IN_LAUNCHER}"),
            ("moe_shared_expert_overlap", "Remove it: the shared expert runs before the others"),
            ("use_torch_fsdp2 use_megatron_fsdp", "Use use_distributed_optimizer"),
            ("data_parallel_size world_size", _RANKS),
            (
                "mock_data",
                "Use `lightseq prepare-data --output PREFIX` (the Python standard library) and data_path",
            ),
            ("train_data_path valid_data_path test_data_path", "Use data_path with split"),
            ("vocab_file merge_file", _TOKENIZER),
            ("padded_vocab_size", "Use vocab_size with make_vocab_size_divisible_by"),
            ("ckpt_format", "Remove it: checkpoints are written in Megatron's torch_dist format"),
            ("no_save_optim", "Use no_load_optim when loading"),
            ("no_save_rng", "Use no_load_rng when loading"),
            ("use_checkpoint_args", "Remove it: a checkpoint of another model is refused by name"),
            ("log_throughput log_params_norm timing_log_level", _LOGS),
            ("tensorboard_log_interval", "Use log_interval"),
        )
    ),
)
"""Arguments of Megatron-LM that have nothing to do with attention, and are written otherwise in recipes."""
