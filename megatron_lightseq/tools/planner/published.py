"""Measurements that others have published with enough detail, to be predicted.

The paper's own tables are in :mod:`megatron_lightseq.tools.compare.paper`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lightseq.config.flat import from_flat
from megatron_lightseq.schedule import Direction, TensorShape
from megatron_lightseq.schedule.choose import Chooser, seconds_per_pair
from megatron_lightseq.schedule.network import Device
from megatron_lightseq.tools.planner.cluster import Cluster
from megatron_lightseq.tools.planner.cost import predict_time
from megatron_lightseq.tools.planner.rates import rates_of
from megatron_lightseq.tools.planner.request import Request

_K = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One figure and its prediction."""

    source: str
    what: str
    unit: str
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.published - 1


_QWEN3_8B: Mapping[str, Any] = {
    "num_layers": 36,
    "hidden_size": 4096,
    "ffn_hidden_size": 12288,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 151936,
}
_LLAMA_2_7B: Mapping[str, Any] = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 11008,
    "num_attention_heads": 32,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 32000,
}
_CHECKPOINTED: Mapping[str, Any] = {
    "bf16": True,
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
    "keep_attention_on_recompute": False,
    "use_distributed_optimizer": True,
}
_TRL_STEPS = {8: (1024, 372.0), 16: (2048, 696.0), 32: (4096, 1346.0)}
"""GPUs to thousands of tokens and seconds per step; for 8 GPUs 364 to 380 were published."""
_EASY_CONTEXT = {64: 7816.0, 128: 4266.0, 512: 2133.0, 700: 1603.0}
"""Thousands of tokens to tokens per second."""
_RATIOS = {
    "a100-80": {"ring": (51.4, 52.5), "zigzag": (81.7, 89.8), "stripe": (69.6, 82.6)},
    "h800": {"ring": (52.1, 53.9), "zigzag": (85.2, 90.2), "stripe": (74.4, 82.9)},
}
"""Percent of ideal by GPU and method: forward, and forward with backward."""
_OUR_NAMES = {"ring": ("ring", "contiguous"), "zigzag": ("zigzag", "zigzag"), "stripe": ("ring", "striped")}


def published() -> list[Published]:
    """Every figure with its prediction."""
    return [*_trl(), *_easy_context(), *_ring_flash_attention()]


def _trl() -> Iterator[Published]:
    for gpus, (thousands, seconds) in _TRL_STEPS.items():
        request = _request(_QWEN3_8B, f"h100:8x{gpus // 8}", gpus, "ulysses", thousands * _K)
        yield Published(
            source="TRL, DeepSpeed's Ulysses",
            what=f"Qwen3-8B, {thousands}K tokens, {gpus} H100",
            unit="s per step",
            published=seconds,
            predicted=predict_time(request).seconds,
        )


def _easy_context() -> Iterator[Published]:
    for thousands, rate in _EASY_CONTEXT.items():
        request = _request(_LLAMA_2_7B, "a100-80:8", 8, "zigzag", thousands * _K)
        yield Published(
            source="EasyContext, zigzag ring",
            what=f"Llama-2-7B, {thousands}K tokens, 8 A100",
            unit="tokens/s",
            published=rate,
            predicted=predict_time(request).tokens_per_s,
        )


def _request(model: Mapping[str, Any], cluster: str, context: int, method: str, seq_length: int) -> Request:
    values = {
        **model,
        **_CHECKPOINTED,
        "context_parallel_size": context,
        "cp_method": method,
        "seq_length": seq_length,
    }
    return Request(config=from_flat(values), cluster=Cluster.parse(cluster), vocab_size=model["vocab_size"])


def _ring_flash_attention() -> Iterator[Published]:
    """8,192 tokens per GPU with Llama-3.1-8B's heads: a rank's share of the kernel time over the time it takes."""
    shape = TensorShape(num_heads=32, num_query_groups=8, head_dim=128)
    for gpu, rows in _RATIOS.items():
        cluster = Cluster.parse(f"{gpu}:8")
        rate = rates_of(cluster).tile_flops_per_s
        device = Device(forward_flops_per_s=rate, backward_flops_per_s=rate)
        chooser = Chooser(8, 64 * _K, device=device)
        for method, (forward, both) in rows.items():
            taken, ideal = [], []
            for direction in Direction:
                name, layout = _OUR_NAMES[method]
                taken.append(chooser.predict(name, layout, direction, shape, cluster.network).seconds)
                whole = range(64 * _K)
                ideal.append(chooser.mask.area(whole, whole) * seconds_per_pair(shape, direction, device) / 8)
            for what, measured, predicted in (
                ("forward", forward, 100 * ideal[0] / taken[0]),
                ("forward and backward", both, 100 * sum(ideal) / sum(taken)),
            ):
                yield Published(
                    source="ring-flash-attention's README",
                    what=f"{method}, {what}, 64K tokens, 8 {gpu}",
                    unit="% of ideal",
                    published=measured,
                    predicted=predicted,
                )
