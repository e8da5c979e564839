"""Measurements published in DistFlashAttn (arXiv 2310.03294v2, COLM 2024), in seconds per iteration.

Cluster: one or two DGX nodes with 8 A100-80GB, NVLink within and InfiniBand between nodes; Adam, one sequence per
iteration, full activation recomputation, bf16/fp16, FlashAttention-2 in all systems.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PaperSystem = Literal["megatron", "lightseq", "lightseq-recompute", "ulysses"]
"""megatron: TP + SP over all GPUs; lightseq: attention is kept instead of recomputed; lightseq-recompute: HuggingFace's
checkpointing, which recomputes attention; ulysses: DeepSpeed-Ulysses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperModel:
    """A model of section 4 and Table 1: 32 layers with Llama's dimensions."""

    name: str
    hidden_size: int = 4096
    num_heads: int = 32
    num_query_groups: int = 32
    num_layers: int = 32
    head_dim: int = 128
    ffn_hidden_size: int = 11008
    vocab_size: int = 32000


LLAMA_7B = PaperModel(name="Llama-7B")
LLAMA_GQA = PaperModel(name="Llama-GQA", num_query_groups=8)
LLAMA_33H = PaperModel(name="Llama-33H", hidden_size=4224, num_heads=33, num_query_groups=33)


@dataclass(frozen=True, slots=True)
class Cell:
    """Identifies one published measurement."""

    system: PaperSystem
    gpus: int
    """8 on one node, 16 on two."""
    seq_length: int
    """Tokens over all GPUs."""
    model: PaperModel


_K = 1024
_COLUMNS: tuple[PaperSystem, PaperSystem] = ("megatron", "lightseq")
_TABLE_1 = {
    (8, 64): ((6.81, 5.98), (6.60, 5.61), (8.37, 6.08)),
    (8, 128): ((20.93, 17.26), (20.53, 16.86), (25.75, 17.77)),
    (8, 256): ((72.75, 58.46), (71.93, 57.01), (90.21, 59.96)),
    (16, 128): ((14.26, 12.75), (14.21, 9.74), (20.63, 13.12)),
    (16, 256): ((43.44, 30.21), (43.20, 28.49), (62.78, 31.33)),
    (16, 512): ((147.06, 106.37), (146.38, 102.34), (216.70, 107.76)),
}
TABLE_1: Mapping[Cell, float] = {
    Cell(system, gpus, thousands * _K, model): seconds
    for (gpus, thousands), row in _TABLE_1.items()
    for model, pair in zip((LLAMA_7B, LLAMA_GQA, LLAMA_33H), row, strict=True)
    for system, seconds in zip(_COLUMNS, pair, strict=True)
}
"""18 cells for Megatron and 18 for DistFlashAttn."""

TABLE_4: Mapping[Cell, float] = {
    Cell("ulysses", 16, 256 * _K, LLAMA_7B): 37.53,
    Cell("ulysses", 16, 512 * _K, LLAMA_7B): 134.09,
    Cell("ulysses", 16, 256 * _K, LLAMA_33H): 56.63,
    Cell("ulysses", 16, 512 * _K, LLAMA_33H): 202.89,
}
"""DeepSpeed-Ulysses."""

TABLE_5: Mapping[Cell, float] = {
    Cell("lightseq-recompute", 8, 8 * tokens * _K, LLAMA_7B): seconds
    for tokens, seconds in ((1, 0.84), (2, 1.29), (4, 2.64), (8, 6.93), (16, 21.44), (32, 76.38))
}
"""HuggingFace's checkpointing on one node, for 1K to 32K tokens per GPU."""

TABLE_5_KEPT: Mapping[Cell, float] = {
    Cell("lightseq", 8, 8 * tokens * _K, LLAMA_7B): seconds
    for tokens, seconds in ((1, 0.84), (2, 1.36), (4, 2.50), (8, 5.98), (16, 17.26), (32, 58.46))
}
"""The same with attention kept; from 8K tokens on, these cells are also in Table 1."""

FITTED: tuple[Cell, ...] = (
    Cell("megatron", 8, 64 * _K, LLAMA_7B),
    Cell("megatron", 8, 256 * _K, LLAMA_7B),
    Cell("megatron", 16, 128 * _K, LLAMA_7B),
    Cell("megatron", 16, 512 * _K, LLAMA_7B),
    Cell("megatron", 8, 128 * _K, LLAMA_33H),
    Cell("megatron", 16, 256 * _K, LLAMA_33H),
    Cell("lightseq", 8, 64 * _K, LLAMA_7B),
    Cell("lightseq", 8, 256 * _K, LLAMA_7B),
    Cell("lightseq", 16, 128 * _K, LLAMA_7B),
    Cell("lightseq", 16, 512 * _K, LLAMA_7B),
    Cell("lightseq", 8, 128 * _K, LLAMA_GQA),
    Cell("lightseq", 16, 256 * _K, LLAMA_GQA),
)
"""The 12 cells of Table 1 that the constants are fitted to: the shortest and longest sequences for the plain model, and
one length in the middle each for padding and grouped queries. The other 24, and Tables 4 and 5, are predicted."""
