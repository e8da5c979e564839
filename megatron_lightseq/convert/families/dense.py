"""Dense decoders: one gated MLP with SiLU for all tokens, norms before attention and MLP."""

from __future__ import annotations

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.convert.families.family import Family, Keys, Names
from megatron_lightseq.convert.families.parts import (
    FULL,
    SLIDING,
    decoder_keys,
    embedding_names,
    expect_silu,
    fused_attention_names,
    fused_mlp_names,
    layer_kinds,
    llama_names,
    norm_names,
    qwen_window_keys,
    window_keys,
)
from megatron_lightseq.convert.families.rope import rope_keys
from megatron_lightseq.convert.fields import Fields


def _llama(fields: Fields) -> Keys:
    for name in ("attention_bias", "mlp_bias", "rope_interleaved"):
        fields.expect(name, False)
    return decoder_keys(fields) | expect_silu(fields) | rope_keys(fields)


def _mistral(fields: Fields) -> Keys:
    keys = decoder_keys(fields, groups=8) | expect_silu(fields) | rope_keys(fields)
    window = fields.take("sliding_window", None)
    kind = FULL if window is None else SLIDING
    return keys | window_keys(window, layer_kinds(fields, [kind] * keys["num_layers"]), fields)


def _qwen2(fields: Fields) -> Keys:
    keys = decoder_keys(fields) | expect_silu(fields) | rope_keys(fields) | qwen_window_keys(fields)
    return keys | {"add_qkv_bias": True}


def _qwen3(fields: Fields) -> Keys:
    fields.expect("attention_bias", False)
    keys = decoder_keys(fields, head_dim=128) | expect_silu(fields) | rope_keys(fields)
    return keys | qwen_window_keys(fields) | {"qk_layernorm": True}


def _phi3(fields: Fields) -> Keys:
    for name in ("embd_pdrop", "resid_pdrop"):
        fields.expect(name, 0.0)
    fields.take("original_max_position_embeddings", None)  # read with longrope
    keys = decoder_keys(fields) | expect_silu(fields) | rope_keys(fields)
    window = fields.take("sliding_window", None)
    kind = FULL if window is None else SLIDING
    return keys | window_keys(window, [kind] * keys["num_layers"], fields)


def _phi3_names(config: PretrainConfig) -> Names:
    return {**embedding_names(), **fused_attention_names(config), **norm_names(), **fused_mlp_names()}


def _smollm3(fields: Fields) -> Keys:
    for name in ("attention_bias", "mlp_bias"):
        fields.expect(name, False)
    keys = decoder_keys(fields, tied=True, groups=4) | expect_silu(fields) | rope_keys(fields, theta=2e6)
    layers = keys["num_layers"]
    every = fields.whole("no_rope_layer_interval", 4)
    rotated = fields.items("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    if not all(rotated):
        without = [number for number, has_rope in enumerate(rotated, 1) if not has_rope]
        regular = without == list(range(without[0], layers + 1, without[0])) and without[0] > 1
        keys["no_rope_freq"] = without[0] if regular else [int(not has_rope) for has_rope in rotated]
    uses, window = fields.flag("use_sliding_window", False), fields.take("sliding_window", None)
    usual = [SLIDING if uses and window is not None and not x else FULL for x in rotated]
    return keys | window_keys(window, layer_kinds(fields, usual), fields)


DENSE = {
    "llama": Family(_llama, llama_names),
    "mistral": Family(_mistral, llama_names),
    "qwen2": Family(_qwen2, llama_names),
    "qwen3": Family(_qwen3, llama_names),
    "phi3": Family(_phi3, _phi3_names),
    "smollm3": Family(_smollm3, llama_names),
}
