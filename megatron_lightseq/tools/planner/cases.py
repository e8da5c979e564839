"""Small runs whose memory is measured, to compare it with what is planned for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.flat import from_flat

BASE: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "make_vocab_size_divisible_by": 64,
    "seq_length": 1024,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "train_iters": 4,
}
"""Six layers, of which two or three are traced."""
VOCAB_SIZE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run."""

    name: str
    world_size: int = 1
    values: Mapping[str, Any] = field(default_factory=dict)
    """Changes to :data:`BASE`."""

    @property
    def config(self) -> PretrainConfig:
        """The configuration of the run."""
        return from_flat({**BASE, **self.values})


def _case(name: str, world_size: int = 1, **values: Any) -> Case:
    return Case(name=name, world_size=world_size, values=values)


def _context(method: str, size: int = 2, **values: Any) -> Case:
    return _case(f"cp{size} {method}", size, context_parallel_size=size, cp_method=method, **values)


_FULL: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
_TENSOR = {"tensor_model_parallel_size": 2}
_PIPELINE = {"pipeline_model_parallel_size": 2, "global_batch_size": 4}
_CONTEXT = {"context_parallel_size": 2, "cp_method": "lightseq"}
_EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 128, "moe_router_topk": 2}
_LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_head_dim": 32,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 32,
}

CASES: tuple[Case, ...] = (
    _case("fp32"),
    _case("bf16", bf16=True),
    _case("bf16, gelu, biases, tied", bf16=True, swiglu=False, add_bias_linear=True),
    _case(
        "untied, large vocabulary",
        untie_embeddings_and_output_weights=True,
        make_vocab_size_divisible_by=8192,
    ),
    _case("selective recompute", recompute_granularity="selective"),
    _case("selective recompute of MLPs", recompute_granularity="selective", recompute_modules=("mlp",)),
    _case("full recompute", **_FULL),
    _case("full recompute, groups of 3", **{**_FULL, "recompute_num_layers": 3}),
    _case("block recompute of 2", **{**_FULL, "recompute_method": "block", "recompute_num_layers": 2}),
    _case("full recompute without kept attention", **_FULL, keep_attention_on_recompute=False),
    _case("slices of MLPs and losses", mlp_tile_tokens=128, loss_tile_tokens=128),
    _case("bf16, full recompute, slices", bf16=True, **_FULL, mlp_tile_tokens=256, loss_tile_tokens=256),
    _case("tp2", 2, **_TENSOR),
    _case("tp2 sp, bf16", 2, **_TENSOR, sequence_parallel=True, bf16=True),
    _case("pp2", 2, **_PIPELINE),
    _case("pp2 interleaved", 2, **_PIPELINE, num_layers=12, num_layers_per_virtual_pipeline_stage=3),
    _case("pp3, bf16", 3, pipeline_model_parallel_size=3, global_batch_size=6, bf16=True, num_layers=12),
    _case("dp2", 2),
    _case("dp2, distributed optimizer, bf16", 2, use_distributed_optimizer=True, bf16=True),
    _case("dp2, distributed optimizer, overlap", 2, use_distributed_optimizer=True, overlap_grad_reduce=True),
    _context("lightseq"),
    _context("lightseq", 3, bf16=True, seq_length=1536),
    _context("ring"),
    _context("zigzag"),
    _context("all_gather", 4),
    _context("mesh", 4),
    _context("ulysses"),
    _context("usp", 4),
    _context("rsa"),
    _context("balanced", 3, seq_length=1536),
    _case("cp2 lightseq, full recompute, bf16", 2, **_CONTEXT, **_FULL, bf16=True),
    _case("tp2 sp cp2", 4, **_TENSOR, **_CONTEXT, sequence_parallel=True),
    _case("pp2 cp2, full recompute", 4, **_PIPELINE, **_CONTEXT, **_FULL),
    _case("experts", **_EXPERTS),
    _case("experts, ep2", 2, **_EXPERTS, expert_model_parallel_size=2),
    _case("mla", **_LATENT),
    _case("mla, cp2, bf16", 2, **_LATENT, **_CONTEXT, bf16=True),
    _case(
        "mla, experts, mtp, cp2 ep2",
        2,
        **_LATENT,
        **_EXPERTS,
        **_CONTEXT,
        expert_model_parallel_size=2,
        mtp_num_layers=1,
    ),
    _case("windows in every other layer", window_size=(127, 0), window_attn_skip_freq=2),
)
