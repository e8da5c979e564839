"""Rules on model variants: sliding windows, latent attention, multi-token prediction."""

from __future__ import annotations

from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.config.sections_model import ModelConfig

WINDOWS, LATENT, MULTI_TOKEN = RuleSet(), RuleSet(), RuleSet()

_LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")


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
    """window_attn_skip_freq exempts layers from window_size, which at least one layer must keep."""
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
