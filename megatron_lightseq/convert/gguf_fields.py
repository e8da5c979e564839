"""What a GGUF file says about its model, in the words of config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megatron_lightseq.convert.fields import Fields
from megatron_lightseq.errors import CheckpointError, UnsupportedError, explain

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
"""Those that can be imported, and transformers' classes."""
LLAMA3_TENSOR = "rope_freqs.weight"
"""Divisors of RoPE's frequencies, which llama.cpp stores for Llama 3.1 and later."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config_of(
    given: Mapping[str, Any],
    origin: str,
    *,
    vocab_size: int,
    tied: bool,
    rope_factors: torch.Tensor | None,
) -> dict[str, Any]:
    """The fields of config.json.

    Args:
        given: every field of the file.
        origin: named in errors.
        vocab_size: rows of the embedding.
        tied: whether the file has no output layer.
        rope_factors: (head dimension / 2,), what the file holds as :data:`LLAMA3_TENSOR`.

    Raises:
        UnsupportedError: an architecture or a field that cannot be converted.
        ConfigError: a field is missing or of another type.
        CheckpointError: fields that contradict each other.
    """
    architecture = given.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            explain(
                got=f"general.architecture {architecture!r} ({origin})",
                rule=f"GGUF files are imported of {', '.join(ARCHITECTURES)}",
                remedy="Import the model from its safetensors files",
            )
        )
    prefix = f"{architecture}."
    values = {
        name.removeprefix(prefix): _short(value) for name, value in given.items() if name.startswith(prefix)
    }
    fields = Fields(values, origin)
    config = _decoder(fields) | {"vocab_size": vocab_size, "tie_word_embeddings": tied}
    if fields.whole("vocab_size", vocab_size) != vocab_size:
        raise _contradiction(
            origin, f"vocab_size {values['vocab_size']}", f"{vocab_size} rows of the embedding"
        )
    config["rope_parameters"] = _rope(fields, config, rope_factors)
    if architecture == "qwen3moe":
        config |= _experts(fields)
    fields.finish()
    ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": "qwen3_moe" if architecture == "qwen3moe" else architecture,
        **config,
        **{
            f"{ours}_token_id": given.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in ids.items()
        },
    }


def _decoder(fields: Fields) -> dict[str, Any]:
    hidden, heads = fields.whole("embedding_length"), fields.whole("attention.head_count")
    head_dim = fields.whole("attention.key_length", hidden // max(heads, 1))
    fields.expect("attention.value_length", head_dim, head_dim)
    fields.expect("rope.dimension_count", head_dim, head_dim)
    return {
        "num_hidden_layers": fields.whole("block_count"),
        "hidden_size": hidden,
        "intermediate_size": fields.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.whole("context_length"),
        "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
    }


def _experts(fields: Fields) -> dict[str, Any]:
    return {
        "num_experts": fields.whole("expert_count"),
        "num_experts_per_tok": fields.whole("expert_used_count"),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,  # llama.cpp knows no other way for this architecture
    }


def _rope(fields: Fields, config: Mapping[str, Any], factors: torch.Tensor | None) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_theta": fields.real("rope.freq_base", 10000.0), "rope_type": "default"}
    kind = fields.take("rope.scaling.type", "none")
    if factors is not None:
        if kind != "none":
            raise fields.refusal(
                "rope.scaling.type", kind, f"a file with {LLAMA3_TENSOR} has no other scaling"
            )
        return found | _llama3(factors, found["rope_theta"], config["head_dim"], fields)
    if kind in ("linear", "yarn"):
        found |= {"rope_type": kind, "factor": fields.real("rope.scaling.factor")}
        original = fields.take("rope.scaling.original_context_length", None)
        if kind == "yarn":
            found["original_max_position_embeddings"] = original or config["max_position_embeddings"]
    elif kind != "none":
        raise fields.refusal("rope.scaling.type", kind, "GGUF files are imported with none, linear and yarn")
    return found


def _llama3(factors: torch.Tensor, theta: float, head_dim: int, fields: Fields) -> dict[str, Any]:
    """Llama 3's scaling, whose only free number is the largest divisor."""
    factor = float(factors.max())
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    share = ((_LLAMA3["original_max_position_embeddings"] / wavelength - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - share) / factor + share)
    if factors.shape != expected.shape or not torch.allclose(factors.double(), expected, rtol=1e-4):
        raise fields.refusal(
            LLAMA3_TENSOR,
            [round(x, 3) for x in factors.flatten().tolist()],
            "it is Llama 3's scaling or is refused",
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _short(value: Any) -> Any:
    """A number as it was before it was stored in single precision: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _contradiction(origin: str, one: str, other: str) -> CheckpointError:
    return CheckpointError(
        explain(
            got=f"{origin} with {one} and {other}", rule="both are the same", remedy="Download the file again"
        )
    )
