"""Writes tiny models as GGUF files, in the way of llama.cpp's converter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}


def write(model: Any, path: Path, *, kind: str = "F32", tokenizer: bool = False, **fields: Any) -> None:
    """Write a model of transformers.

    Args:
        model: of one of :data:`ARCHITECTURES`.
        path: file to write.
        kind: of matrices: F32, F16, BF16, Q8_0 or another type that the package quantises; vectors stay F32.
        tokenizer: whether to write one, of bytes and two merges.
        fields: of the file, without the architecture, with ``__`` for dots: what to change or add.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**_fields(config), **fields}.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{name.replace('__', '.')}", value)
    if tokenizer:
        _add_tokenizer(writer, config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in _tensors(model).items():
        _add(writer, name, tensor, kind if tensor.dim() > 1 else "F32")
    parameters = config.rope_parameters
    if parameters["rope_type"] == "llama3":
        _add(writer, "rope_freqs.weight", _llama3_divisors(parameters, config.head_dim), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _fields(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None:
        found |= {f"attention.{x}_length": head_dim for x in ("key", "value")}
        found["rope.dimension_count"] = head_dim
    if config.model_type == "qwen3_moe":
        found |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    return found


def _add_tokenizer(writer: Any, size: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "th", "the"]
    words += [f"<unused{number}>" for number in range(size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(["t h", "th e"])


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    config = model.config
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, kind = name.rpartition(".")
        heads = {
            "self_attn.q_proj": config.num_attention_heads,
            "self_attn.k_proj": config.num_key_value_heads,
        }
        if not stem.startswith("model.layers."):
            found[f"{NAMES[stem]}.{kind}"] = tensor
            continue
        _, _, layer, part = stem.split(".", 3)
        block = f"blk.{layer}."
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, 1)
            found |= {f"{block}ffn_gate_exps.weight": gate, f"{block}ffn_up_exps.weight": up}
        elif name.endswith("experts.down_proj"):
            found[f"{block}ffn_down_exps.weight"] = tensor
        else:
            if part in heads and config.model_type == "llama":
                tensor = (
                    tensor.reshape(heads[part], 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
                )
            found[f"{block}{NAMES[part]}.{kind}"] = tensor
    return found


def _add(writer: Any, name: str, tensor: torch.Tensor, kind: str) -> None:
    numbers = tensor.detach().float().contiguous().numpy()
    if kind == "F32":
        writer.add_tensor(name, numbers)
    elif kind == "F16":
        writer.add_tensor(name, numbers.astype(np.float16))
    else:
        quantised = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(numbers, quantised), raw_dtype=quantised)


def _llama3_divisors(parameters: dict[str, Any], head_dim: int) -> torch.Tensor:
    """As llama.cpp computes them."""
    low = parameters["original_max_position_embeddings"] / parameters["low_freq_factor"]
    high = parameters["original_max_position_embeddings"] / parameters["high_freq_factor"]
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * parameters["rope_theta"] ** (i / head_dim)
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(parameters["factor"])
        else:
            smooth = (
                parameters["original_max_position_embeddings"] / wavelength - parameters["low_freq_factor"]
            ) / (parameters["high_freq_factor"] - parameters["low_freq_factor"])
            found.append(1 / ((1 - smooth) / parameters["factor"] + smooth))
    return torch.tensor(found)
