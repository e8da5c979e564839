"""Rates that a cluster reaches: fractions of its data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lightseq.tools.planner.cluster import Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast a cluster computes and transfers."""

    linear_flops_per_s: float
    """Everything except attention, per GPU."""
    attention_flops_per_s: float
    """FlashAttention on whole causal sequences, per GPU."""
    tile_flops_per_s: float
    """FlashAttention on the tiles of a schedule, per GPU."""
    node_collective_bytes_per_s: float
    """Bus bandwidth of all-gather and reduce-scatter across nodes, of all GPUs of a node together."""
    node_link_bytes_per_s: float
    """Bandwidth between nodes for point-to-point messages and all-to-all, in each direction, of a whole node."""
    fixed_s: float = 0.0
    """Per step: what does not depend on the sequence length."""
    nvlink_collective_bytes_per_s: float = 230e9
    """Bus bandwidth of NCCL's all-gather on 8 A100s with NVSwitch, as reported by nccl-tests; not fitted."""
    nvlink_bytes_per_s: float = 200e9
    """Point-to-point bandwidth between two A100s of a node; not fitted."""

    def collective_seconds(self, num_bytes: float, size: int, apart: int, cluster: Cluster) -> float:
        """Duration of an all-gather or reduce-scatter of ``num_bytes`` in all.

        Args:
            num_bytes: of the whole result of a gather, or of the whole input of a scatter.
            size: ranks that take part.
            apart: distance between neighbouring ranks; as many groups run at the same time.
            cluster: says which ranks share a node.
        """
        if size == 1:
            return 0.0
        rate = self.nvlink_collective_bytes_per_s
        if size * apart > cluster.gpus_per_node:
            rate = min(rate, self.node_collective_bytes_per_s / min(apart, cluster.gpus_per_node))
        return num_bytes * (size - 1) / size / rate


A100_CLUSTER = Rates(
    linear_flops_per_s=210.3e12,
    attention_flops_per_s=168.4e12,
    tile_flops_per_s=173.8e12,
    node_collective_bytes_per_s=98.53e9,
    node_link_bytes_per_s=59.39e9,
    fixed_s=0.4445,
)
"""The paper's cluster: the result of :func:`megatron_lightseq.tools.compare.paper.fit.fit` for 12 cells of Table 1; a
test repeats the fit. The values are plausible: eight cards of 100 Gbps per node carry 100e9 bytes per second, and
FlashAttention-2 reports 170e12 to 190e12 FLOP/s for causal training on an A100."""
_A100_PEAK, _A100_LINK, _A100_CARDS = 312e12, 300e9, 100e9
"""Data sheets of that cluster."""
_HOPPER_ATTENTION = 0.59
"""Of the peak: 600 and 582 TFLOP/s forward and backward on H100s with FlashAttention-3, 64 query and 8 key/value heads,
head dim 128, causal, in MagiAttention's published benchmark (Ulysses on 8 GPUs, where transfers hardly count)."""
_LATER_THAN_AMPERE = 900e12
"""Peaks from here on are of GPUs with FlashAttention-3's kind of kernels."""


def rates_of(cluster: Cluster) -> Rates:
    """The rates of a cluster: the fractions of the data sheets that the paper's cluster reaches.

    Attention on Hopper and later is a fraction of its own, because its kernels are others.
    """
    gpu, network, fitted = cluster.gpu, cluster.network, A100_CLUSTER
    scale = gpu.peak_flops_per_s / _A100_PEAK
    attention, tile = fitted.attention_flops_per_s * scale, fitted.tile_flops_per_s * scale
    if gpu.peak_flops_per_s > _LATER_THAN_AMPERE:
        attention = tile = _HOPPER_ATTENTION * gpu.peak_flops_per_s
    link, cards = network.link_bytes_per_s / _A100_LINK, network.nic_bytes_per_s / _A100_CARDS
    return Rates(
        linear_flops_per_s=fitted.linear_flops_per_s * scale,
        attention_flops_per_s=attention,
        tile_flops_per_s=tile,
        node_collective_bytes_per_s=fitted.node_collective_bytes_per_s * cards,
        node_link_bytes_per_s=fitted.node_link_bytes_per_s * cards,
        nvlink_collective_bytes_per_s=fitted.nvlink_collective_bytes_per_s * link,
        nvlink_bytes_per_s=fitted.nvlink_bytes_per_s * link,
    )
