"""Rules on model variants: sliding windows, latent attention, multi-token prediction, mixture of experts."""

from __future__ import annotations

from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.sections import ExpertsConfig, ModelConfig, PretrainConfig

WINDOWS, LATENT, MULTI_TOKEN, EXPERTS = RuleSet(), RuleSet(), RuleSet(), RuleSet()

_LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_EXPERT_KEYS = (
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_token_dispatcher_type",
    "moe_shared_expert_intermediate_size",
    "moe_grouped_gemm",
)


# --- windows ----------------------------------------------------------------------------------------------------


@WINDOWS.rule(
    "window_size",
    remedy="Write, for example, window_size: [1023, 0], or remove it",
)
def window_is_causal(c: PretrainConfig, _: Machine) -> bool:
    """window_size is two numbers, tokens back and tokens ahead, and a causal model sees no tokens ahead."""
    size = c.model.window_size
    return not size or (len(size) == 2 and size[0] >= 0 and size[1] == 0)


@WINDOWS.rule(
    "window_attn_skip_freq",
    "window_size",
    "num_layers",
    remedy="Set window_size and a window_attn_skip_freq of 2 or more, or remove window_attn_skip_freq",
)
def skipped_windows_are_there(c: PretrainConfig, _: Machine) -> bool:
    """window_attn_skip_freq exempts every n-th layer from window_size, which at least one layer must keep."""
    return c.model.window_attn_skip_freq is None or c.model.num_window_layers > 0


@WINDOWS.rule(
    "softmax_type",
    "cp_method",
    "tensor_model_parallel_size",
    needs="has_transformer_engine",
    remedy="Set tensor_model_parallel_size to 1, or choose another cp_method",
)
def megatrons_sinks_are_whole(c: PretrainConfig, m: Machine) -> bool:
    """Megatron's local attention ignores that learnable softmax logits are split over tensor parallel ranks: all ranks
    would start from the same values, and the gradient norm would count only those of one rank.
    """
    cut = c.model.softmax_type == "learnable" and c.parallel.tensor_model_parallel_size > 1
    return not cut or c.context.cp_method != "megatron" or m.has_transformer_engine is not False


# --- multi-latent attention -------------------------------------------------------------------------------------


@LATENT.rule(
    "multi_latent_attention",
    *_LATENT_KEYS,
    remedy="Set multi_latent_attention to true, or remove them; without it, kv_channels is the head dimension",
)
def latent_keys_need_latent_attention(c: PretrainConfig, _: Machine) -> bool:
    """the widths of latent vectors and their head dimensions apply only to multi_latent_attention."""
    defaults = ModelConfig()
    unchanged = all(getattr(c.model, key) == getattr(defaults, key) for key in _LATENT_KEYS)
    return c.model.multi_latent_attention or unchanged


@LATENT.rule(
    "multi_latent_attention",
    "num_query_groups",
    "kv_channels",
    remedy="Remove num_query_groups and kv_channels; set qk_head_dim, qk_pos_emb_head_dim and v_head_dim",
)
def latent_attention_has_no_groups(c: PretrainConfig, _: Machine) -> bool:
    """in latent attention every query head has its own key and value heads, and kv_channels does not apply."""
    plain = c.model.num_query_groups is None and c.model.kv_channels is None
    return not c.model.multi_latent_attention or plain


@LATENT.rule(
    "multi_latent_attention",
    "position_embedding_type",
    "rotary_percent",
    remedy="Set position_embedding_type to rope and rotary_percent to 1.0",
)
def latent_attention_uses_rope(c: PretrainConfig, _: Machine) -> bool:
    """latent attention applies RoPE to all of qk_pos_emb_head_dim."""
    all_rotated = c.model.position_embedding_type == "rope" and c.model.rotary_percent == 1
    return not c.model.multi_latent_attention or all_rotated


@LATENT.rule(
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_pos_emb_head_dim",
    "tensor_model_parallel_size",
    remedy="Change them to multiples of {tensor_model_parallel_size}",
)
def latent_vectors_divide_by_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    """tensor parallelism splits the projections to latent vectors: q_lora_rank, and kv_lora_rank + qk_pos_emb_head_dim,
    must be multiples of its size.
    """
    widths = (c.model.q_lora_rank or 0, c.model.kv_lora_rank + c.model.qk_pos_emb_head_dim)
    size = c.parallel.tensor_model_parallel_size
    return not c.model.multi_latent_attention or all(width % size == 0 for width in widths)


# --- multi-token prediction -------------------------------------------------------------------------------------


@MULTI_TOKEN.rule(
    "mtp_num_layers",
    "mtp_loss_scaling_factor",
    remedy="Set mtp_num_layers, or remove mtp_loss_scaling_factor",
)
def mtp_loss_needs_layers(c: PretrainConfig, _: Machine) -> bool:
    """mtp_loss_scaling_factor needs mtp_num_layers, whose loss it weights."""
    unchanged = c.model.mtp_loss_scaling_factor == ModelConfig().mtp_loss_scaling_factor
    return c.model.mtp_num_layers is not None or unchanged


@MULTI_TOKEN.rule(
    "mtp_num_layers",
    "position_embedding_type",
    remedy="Set position_embedding_type to rope or none",
)
def mtp_learns_no_positions(c: PretrainConfig, _: Machine) -> bool:
    """multi-token prediction also embeds tokens on the last pipeline stage, which has no learned positions."""
    return c.model.mtp_num_layers is None or c.model.position_embedding_type != "learned_absolute"


@MULTI_TOKEN.rule(
    "mtp_num_layers",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    remedy="Set recompute_method to uniform and recompute_num_layers to 1",
)
def mtp_recomputes_uniformly(c: PretrainConfig, _: Machine) -> bool:
    """Megatron recomputes multi-token prediction layers only uniformly, one layer at a time."""
    if c.model.mtp_num_layers is None or c.recompute.recompute_granularity != "full":
        return True
    if c.recompute.recompute_method is None or c.recompute.recompute_num_layers is None:
        return True  # this has its own rule
    return c.recompute.recompute_method == "uniform" and c.recompute.recompute_num_layers == 1


# --- mixture of experts -----------------------------------------------------------------------------------------


@EXPERTS.rule(
    "num_experts",
    *_EXPERT_KEYS,
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    remedy="Set num_experts, or remove the other keys",
)
def expert_keys_need_experts(c: PretrainConfig, _: Machine) -> bool:
    """expert options require num_experts."""
    sizes = (c.parallel.expert_model_parallel_size, c.parallel.expert_tensor_parallel_size)
    return c.experts.num_experts is not None or (c.experts == ExpertsConfig() and sizes == (1, None))


@EXPERTS.rule(
    "moe_router_topk",
    "num_experts",
    remedy="Use a moe_router_topk of at most {num_experts}",
)
def topk_is_within_experts(c: PretrainConfig, _: Machine) -> bool:
    """a token is routed to moe_router_topk different experts."""
    return c.experts.num_experts is None or c.experts.moe_router_topk <= c.experts.num_experts


@EXPERTS.rule(
    "num_experts",
    "expert_model_parallel_size",
    remedy="Use a num_experts that is a multiple of {expert_model_parallel_size}",
)
def experts_divide_by_expert_parallel(c: PretrainConfig, _: Machine) -> bool:
    """num_experts must be a multiple of expert_model_parallel_size, because every rank holds whole experts."""
    experts = c.experts.num_experts
    return experts is None or experts % c.parallel.expert_model_parallel_size == 0


@EXPERTS.rule(
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    needs="world_size",
    remedy="Lower expert_model_parallel_size, or start more ranks",
)
def world_size_holds_experts(c: PretrainConfig, m: Machine) -> bool:
    """the world size must be a multiple of expert tensor (null: tensor) * expert model * pipeline parallel sizes."""
    if c.experts.num_experts is None or (m.world_size or 0) % c.parallel.model_parallel_size:
        return True  # the latter has its own rule
    return (m.world_size or 0) % c.parallel.expert_parallel_size == 0


@EXPERTS.rule(
    "expert_tensor_parallel_size",
    "tensor_model_parallel_size",
    "expert_model_parallel_size",
    remedy="Set expert_tensor_parallel_size to null, or expert_model_parallel_size to 2 or more",
)
def expert_copies_are_replicas(c: PretrainConfig, _: Machine) -> bool:
    """tensor parallel ranks that hold copies of an expert must be registered as its replicas, which Megatron's layers
    do only with expert_model_parallel_size > 1; otherwise the copies would drift apart.
    """
    same = c.parallel.expert_tensor_size == c.parallel.tensor_model_parallel_size
    return c.experts.num_experts is None or same or c.parallel.expert_model_parallel_size > 1


@EXPERTS.rule(
    "num_experts",
    "tensor_model_parallel_size",
    "sequence_parallel",
    remedy="Set sequence_parallel to true",
)
def experts_need_sequence_parallel(c: PretrainConfig, _: Machine) -> bool:
    """with tensor parallelism, the router sees every token exactly once only if sequence_parallel is on."""
    cut = c.parallel.tensor_model_parallel_size == 1 or c.parallel.sequence_parallel
    return c.experts.num_experts is None or cut


@EXPERTS.rule(
    "moe_ffn_hidden_size",
    "ffn_hidden_size",
    "expert_tensor_parallel_size",
    "tensor_model_parallel_size",
    remedy="Change moe_ffn_hidden_size to such a multiple",
)
def experts_divide_by_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    """the width of an expert (moe_ffn_hidden_size, or ffn_hidden_size) must be a multiple of
    expert_tensor_parallel_size (null: tensor_model_parallel_size).
    """
    return c.experts.num_experts is None or c.expert_ffn_size % c.parallel.expert_tensor_size == 0


@EXPERTS.rule(
    "moe_shared_expert_intermediate_size",
    "tensor_model_parallel_size",
    remedy="Use a moe_shared_expert_intermediate_size that is a multiple of {tensor_model_parallel_size}",
)
def shared_expert_divides_by_tensor_parallel(c: PretrainConfig, _: Machine) -> bool:
    """the width of the shared expert must be a multiple of tensor_model_parallel_size."""
    width = c.experts.moe_shared_expert_intermediate_size
    return width is None or width % c.parallel.tensor_model_parallel_size == 0


@EXPERTS.rule(
    "num_experts",
    "add_bias_linear",
    remedy="Set add_bias_linear to false",
)
def experts_have_no_bias(c: PretrainConfig, _: Machine) -> bool:
    """experts do not have biases."""
    return c.experts.num_experts is None or not c.model.add_bias_linear


@EXPERTS.rule(
    "moe_aux_loss_coeff",
    "moe_router_load_balancing_type",
    remedy="Set moe_router_load_balancing_type to aux_loss or seq_aux_loss, or moe_aux_loss_coeff to 0",
)
def aux_loss_has_a_type(c: PretrainConfig, _: Machine) -> bool:
    """moe_aux_loss_coeff weights a load balancing loss, which moe_router_load_balancing_type none lacks."""
    return c.experts.moe_aux_loss_coeff == 0 or c.experts.moe_router_load_balancing_type != "none"


@EXPERTS.rule(
    "moe_grouped_gemm",
    "num_experts",
    needs="has_transformer_engine",
    remedy="Set moe_grouped_gemm to false, or install transformer_engine on a machine with GPUs",
)
def grouped_gemm_needs_transformer_engine(c: PretrainConfig, m: Machine) -> bool:
    """the grouped GEMM over local experts comes from Transformer Engine, which is not available."""
    return not c.experts.moe_grouped_gemm or m.has_transformer_engine is not False


@EXPERTS.rule(
    "num_experts",
    "recompute_granularity",
    "recompute_modules",
    remedy="Remove mlp from recompute_modules, or use full recompute",
)
def experts_are_not_recomputed_as_mlp(c: PretrainConfig, _: Machine) -> bool:
    """Megatron ignores selective recompute of mlp in layers with experts."""
    asked = c.recompute.recompute_granularity == "selective" and "mlp" in c.recompute.recompute_modules
    return c.experts.num_experts is None or not asked
