"""Rules on single numbers (bounds) and on the model.

A rule is a predicate named after what holds; the decorator carries its message.
"""

from __future__ import annotations

import math

from megatron_lightseq.config.rules import Bound, Machine, RuleSet, bound_rule
from megatron_lightseq.config.sections import PretrainConfig

_COUNT = Bound(low=1)
_NOT_NEGATIVE = Bound(low=0)
_POSITIVE = Bound(low=0, open_low=True)
_PROBABILITY = Bound(low=0, high=1)
_ANY = Bound(low=-math.inf, open_low=True)

BOUNDS = RuleSet(
    bound_rule(key, bound)
    for bound, keys in {
        _COUNT: "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels "
        "max_position_embeddings rotary_base make_vocab_size_divisible_by tensor_model_parallel_size "
        "pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage context_parallel_size cp_ulysses_size "
        "recompute_num_layers mlp_tile_tokens loss_tile_tokens cp_invariant "
        "eval_interval log_interval vocab_size save_interval save_retain_interval save_keep_last "
        "max_bad_steps step_timeout_factor check_weight_hash_across_dp_replicas_interval "
        "trace_step_start trace_step_end "
        "q_lora_rank kv_lora_rank qk_head_dim "
        "qk_pos_emb_head_dim v_head_dim mtp_num_layers num_experts moe_ffn_hidden_size attention_chunk_size "
        "moe_router_num_groups moe_router_group_topk yarn_original_max_position_embeddings "
        "rotary_base_local rotary_seq_len_interpolation_factor rope_scaling_factor yarn_rotary_scaling_factor "
        "rotary_scaling_factor floor_scale "
        "moe_router_topk moe_shared_expert_intermediate_size expert_model_parallel_size expert_tensor_parallel_size "
        "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads "
        "lora_dim",
        _NOT_NEGATIVE: "min_lr lr_warmup_iters weight_decay clip_grad mtp_loss_scaling_factor "
        "moe_aux_loss_coeff moe_z_loss_coeff moe_router_bias_update_rate yarn_mscale yarn_mscale_all_dim mscale "
        "mscale_all_dim attn_scale load_iteration",
        _POSITIVE: "norm_epsilon init_method_std loss_spike_factor rank_silence_seconds step_timeout_seconds lr "
        "adam_eps distributed_timeout_minutes exit_duration_in_mins "
        "lora_alpha "
        "softmax_scale query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping embedding_multiplier "
        "activation_func_clamp_value moe_router_topk_scaling_factor yarn_beta_fast yarn_beta_slow beta_fast beta_slow",
        _ANY: "glu_linear_offset",
        Bound(low=2): "original_max_position_embeddings",
        Bound(low=1, open_low=True): "straggler_factor",
        # Far beyond any run, and below what would take hours or all memory before the first step.
        Bound(low=1, high=10**9, open_high=False): "train_iters lr_decay_iters eval_iters",
        Bound(low=1, high=2**31): "seq_length micro_batch_size global_batch_size",
        Bound(low=0, high=256, open_high=False): "num_workers",
        _PROBABILITY: "attention_dropout hidden_dropout lora_dropout adam_beta1 adam_beta2",
        Bound(low=0, high=1, open_low=True, open_high=False): "rotary_percent",
        Bound(low=0, high=2**32): "seed",
    }.items()
    for key in keys.split()
)

MODEL = RuleSet()


@MODEL.rule(
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    remedy="Use a hidden_size that is a multiple of {num_attention_heads}, or set kv_channels",
)
def hidden_size_divides_by_heads(c: PretrainConfig, _: Machine) -> bool:
    """hidden_size must be a multiple of num_attention_heads unless kv_channels sets the head dimension."""
    given = c.model.kv_channels is not None or c.model.multi_latent_attention
    return given or c.model.hidden_size % c.model.num_attention_heads == 0


@MODEL.rule(
    "num_attention_heads",
    "num_query_groups",
    remedy="Use a num_query_groups that divides {num_attention_heads}",
)
def heads_divide_by_query_groups(c: PretrainConfig, _: Machine) -> bool:
    """num_attention_heads must be a multiple of num_query_groups."""
    return c.model.num_attention_heads % c.model.query_groups == 0


@MODEL.rule(
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "qk_pos_emb_head_dim",
    "rotary_percent",
    "position_embedding_type",
    remedy="Use an even head dimension and a rotary_percent such as 1.0 or 0.5",
)
def rotary_dimension_is_even(c: PretrainConfig, _: Machine) -> bool:
    """RoPE rotates pairs of dimensions: the head dimension (qk_pos_emb_head_dim with latent attention) times
    rotary_percent must be an even number.
    """
    latent = c.model.multi_latent_attention
    rotated = (c.model.qk_pos_emb_head_dim if latent else c.model.head_dim) * c.model.rotary_percent
    rotates = c.model.position_embedding_type in ("rope", "yarn")
    return not rotates or (int(rotated) >= 2 and rotated % 2 == 0)


@MODEL.rule(
    "seq_length",
    "max_position_embeddings",
    remedy="Set max_position_embeddings to null or to at least {seq_length}",
)
def positions_reach_seq_length(c: PretrainConfig, _: Machine) -> bool:
    """seq_length must not exceed max_position_embeddings."""
    longest = c.model.max_position_embeddings
    return longest is None or c.training.seq_length <= longest
