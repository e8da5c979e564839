"""The parts of a model that Megatron's GPTModel has no arguments for."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.megatron.logits import finish_logits
from megatron_lightseq.megatron.rope_kinds import LongRopeEmbedding, TwoBaseRotaryEmbedding, long_rope_factor

YARN = (
    "yarn_rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_mscale",
    "yarn_mscale_all_dim",
    "yarn_correction_range_round_to_int",
)
"""What GPTModel reads from TransformerConfig for YaRN, although the latter does not declare it."""


def rope_attributes(config: PretrainConfig) -> dict[str, Any]:
    """What Megatron's layers read from TransformerConfig about RoPE, although the latter does not declare it."""
    if config.model.position_embedding_type == "yarn":
        return {name: getattr(config.rope, name) for name in YARN}
    if config.rope.rope_type == "longrope":
        return _long_rope_attributes(config)
    return {}


def _long_rope_attributes(config: PretrainConfig) -> dict[str, Any]:
    """LongRoPE's factor of cosines and sines, in the only form that Megatron's attention takes one: YaRN's.

    It computes 0.1 * mscale * log(scaling factor) + 1.
    """
    longest = config.model.max_position_embeddings or config.training.seq_length
    factor = long_rope_factor(longest, config.rope.original_max_position_embeddings)
    return {
        "yarn_rotary_scaling_factor": math.e,
        "yarn_mscale": (factor - 1) / 0.1,
        "yarn_mscale_all_dim": 0.0,
    }


def finish_model(config: PretrainConfig, model: GPTModel, vocab_size: int) -> None:
    """Replace and extend what GPTModel has built: rotary embeddings, the scale of embeddings, logits.

    Args:
        config: of the run.
        model: as Megatron has built it, before slices, layouts and wrappers.
        vocab_size: without padding.
    """
    _replace_rotary(config, model)
    multiplier = config.model.embedding_multiplier
    if multiplier is not None and hasattr(model, "embedding"):
        model.embedding.register_forward_hook(_Multiply(multiplier))
    if model.post_process:
        finish_logits(model, vocab_size, config.model.final_logit_softcapping)


class _Multiply:
    """A forward hook: the output times a number, which is rounded to its dtype first, as Gemma does."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def __call__(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        del module, args
        return output * torch.tensor(self._factor, dtype=output.dtype, device=output.device)


def _replace_rotary(config: PretrainConfig, model: GPTModel) -> None:
    rope, settings = config.rope, model.config
    if rope.rope_type != "longrope" and rope.rotary_base_local is None:
        return
    options = {
        "kv_channels": settings.kv_channels,
        "rotary_percent": config.model.rotary_percent,
        "rotary_interleaved": rope.rotary_interleaved,
        "use_cpu_initialization": settings.use_cpu_initialization,
        "cp_group": model.pg_collection.cp,
    }
    if rope.rope_type == "longrope":
        is_long = config.training.seq_length > rope.original_max_position_embeddings
        factors = rope.longrope_long_factor if is_long else rope.longrope_short_factor
        base = config.model.rotary_base
        model.rotary_pos_emb = LongRopeEmbedding(factors=factors, rotary_base=base, **options)
    if rope.rotary_base_local is not None:
        model.rotary_pos_emb = TwoBaseRotaryEmbedding(
            local_base=rope.rotary_base_local, whole=model.rotary_pos_emb, **options
        )
