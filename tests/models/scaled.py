"""Recipes of public models, scaled down: the same keys, with a few small layers."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.config.flat import to_flat
from megatron_lightseq.config.load import parse_config

FOLDER = Path(__file__).parents[2] / "configs" / "models"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

DELTA_NETS = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
HIDDEN, HEAD_DIM, VOCAB_SIZE = 128, 16, 251


def read(path: Path) -> PretrainConfig:
    """A recipe as it is written, without the rules on data and machine."""
    return parse_config([str(path)])


def scaled(config: PretrainConfig, *, seq_length: int = 96, **overrides: Any) -> PretrainConfig:
    """The same architecture with at most 6 layers, heads and groups in proportion, and a short sequence."""
    model, experts, rope = config.model, config.experts, config.rope
    layers = _layers(config)
    shrink = seq_length / config.training.seq_length
    values: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 2 * HIDDEN,
        "seq_length": seq_length,
        "vocab_size": VOCAB_SIZE,
        "context_parallel_size": 1,
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "train_iters": 3,
        "lr": 1e-3,
        "init_method_std": 0.05,
        **_heads(config),
        **_patterns(config, layers),
    }
    if model.window_size:
        values["window_size"] = (max(3, int(model.window_size[0] * shrink)), 0)
    if model.attention_chunk_size is not None:
        values["attention_chunk_size"] = max(8, int(model.attention_chunk_size * shrink))
        values["floor_scale"] = max(1.0, model.floor_scale * shrink)
    if model.max_position_embeddings is not None:
        values["max_position_embeddings"] = max(seq_length, int(model.max_position_embeddings * shrink))
    if rope.rope_type == "longrope":
        values["original_max_position_embeddings"] = max(
            2, int(rope.original_max_position_embeddings * shrink)
        )
    if rope.yarn_original_max_position_embeddings is not None:
        values["yarn_original_max_position_embeddings"] = max(
            16, int(rope.yarn_original_max_position_embeddings * shrink)
        )
    if config.linear.experimental_attention_variant == "gated_delta_net":
        values |= DELTA_NETS
    if experts.num_experts is not None:
        values |= _experts(config)
    return with_values(config, **{**values, **overrides})


def _layers(config: PretrainConfig) -> int:
    """Enough for both kinds of layers, where there are two."""
    periods = [
        freq
        for freq in (
            config.model.window_attn_skip_freq,
            config.rope.no_rope_freq,
            config.linear.linear_attention_freq,
        )
        if isinstance(freq, int)
    ]
    return max([2, *(min(6, freq) for freq in periods)])


def _heads(config: PretrainConfig) -> dict[str, Any]:
    model = config.model
    if model.multi_latent_attention:
        widths = {"kv_lora_rank": 32, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16}
        if model.q_lora_rank is not None:
            widths["q_lora_rank"] = 48
        return {"num_attention_heads": 4, **widths}
    per_group = model.num_attention_heads // model.query_groups
    groups = 1 if per_group >= 4 else 2
    heads: dict[str, Any] = {
        "num_attention_heads": groups * per_group,
        "num_query_groups": groups,
        "kv_channels": HEAD_DIM,
    }
    if config.rope.rope_type == "longrope":
        pairs = int(HEAD_DIM * model.rotary_percent) // 2
        for key in ("longrope_short_factor", "longrope_long_factor"):
            whole = getattr(config.rope, key)
            heads[key] = tuple(whole[index * len(whole) // pairs] for index in range(pairs))
    return heads


def _patterns(config: PretrainConfig, layers: int) -> dict[str, Any]:
    """Lists shortened to the layers that are left, in which both kinds stay."""
    found = {}
    for key in ("window_attn_skip_freq", "no_rope_freq", "moe_layer_freq", "linear_attention_freq"):
        pattern = to_flat(config)[key]
        if isinstance(pattern, tuple):
            found[key] = (*pattern[: layers - 1], pattern[-1])
    return found


def _experts(config: PretrainConfig) -> dict[str, Any]:
    experts, count = config.experts, min(8, config.experts.num_experts or 0)
    chosen = min(experts.moe_router_topk, 4)
    found: dict[str, Any] = {"num_experts": count, "moe_ffn_hidden_size": 32, "moe_router_topk": chosen}
    if experts.moe_shared_expert_intermediate_size is not None:
        found["moe_shared_expert_intermediate_size"] = 64
    if experts.moe_router_num_groups is not None:
        found |= {"moe_router_num_groups": 4, "moe_router_group_topk": gcd(2, chosen)}
    return found
