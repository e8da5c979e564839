"""Clusters: GPUs by name, how many there are, and the network between them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_lightseq.config.names import nearest
from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.schedule import Network

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU: what it holds, and how fast it computes in bf16."""

    name: str
    memory_bytes: int
    """What a process can allocate: the card's memory without what the driver and error correction keep."""
    peak_flops_per_s: float
    """Of dense bf16 matrix products, by the data sheet."""
    link_bytes_per_s: float
    """To the GPUs of the same node, in each direction, by the data sheet."""
    memory_bytes_per_s: float
    """Bandwidth of its memory, by the data sheet."""
    nic_bytes_per_s: float
    """Of the network cards of a node of eight in a usual cluster of these GPUs, in each direction."""


def _gpu(name: str, gib: float, tflops: float, link_gb: float, memory_tb: float, nic_gb: float) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=int(gib * GIB),
        peak_flops_per_s=tflops * 1e12,
        link_bytes_per_s=link_gb * 1e9,
        memory_bytes_per_s=memory_tb * 1e12,
        nic_bytes_per_s=nic_gb * 1e9,
    )


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # name, GiB, TFLOP/s, NVLink GB/s, memory TB/s, node's cards GB/s: NVIDIA's data sheets of the SXM versions;
        # cards as in DGX A100 (8 x 200 Gbit/s), DGX H100, H200 and B200 (8 x 400 Gbit/s).
        _gpu("a100-40", 39.4, 312, 300, 1.555, 200),
        _gpu("a100-80", 79.2, 312, 300, 2.039, 200),
        _gpu("a800-80", 79.2, 312, 200, 2.039, 200),
        _gpu("h100", 79.2, 989, 450, 3.35, 400),
        _gpu("h800", 79.2, 989, 200, 3.35, 400),
        _gpu("h200", 139.8, 989, 450, 4.8, 400),
        _gpu("b200", 178.4, 2250, 900, 7.7, 400),
        _gpu("l40s", 44.4, 362, 32, 0.864, 50),  # PCIe 4.0 x16 instead of NVLink, two cards of 200 Gbit/s
    )
}
_SYNONYMS = {"a100": "a100-80", "a800": "a800-80", "h100-80": "h100", "h200-141": "h200"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """GPUs of one kind in nodes of equal size."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    network: Network

    @staticmethod
    def parse(text: str) -> Cluster:
        """A cluster such as ``h100:8x16``: GPU, GPUs per node, nodes.

        Raises:
            ConfigError: the text has another form, or names an unknown GPU.
        """
        found = re.fullmatch(r"([^:]+):(\d+)(?:x(\d+))?", text.strip())
        if found is None:
            raise ConfigError(
                explain(
                    got=f"cluster {text!r}",
                    rule="a cluster is GPU:GPUS_PER_NODExNODES, for example h100:8x16",
                    remedy="Write it that way, or give --gpus with --gpu",
                )
            )
        per_node, nodes = int(found[2]), int(found[3] or 1)
        return Cluster.of(gpu_named(found[1]), per_node * nodes, gpus_per_node=per_node)

    @staticmethod
    def of(gpu: Gpu, num_gpus: int, *, gpus_per_node: int = 8, network: Network | None = None) -> Cluster:
        """``num_gpus`` of one kind.

        Args:
            gpu: the kind.
            num_gpus: all of them.
            gpus_per_node: in each node.
            network: between the GPUs; default: by the GPU's data sheet.

        Raises:
            ConfigError: there are none, or the last node is not full.
        """
        per_node = min(gpus_per_node, num_gpus)
        if per_node < 1 or num_gpus % per_node:
            raise ConfigError(
                explain(
                    got=f"{num_gpus} GPUs in nodes of {gpus_per_node}",
                    rule="a cluster has one GPU or more, and full nodes",
                    remedy="Give --gpus a positive multiple of --gpus-per-node",
                )
            )
        return Cluster(
            gpu=gpu,
            num_gpus=num_gpus,
            gpus_per_node=per_node,
            network=network or default_network(gpu, per_node),
        )

    def __str__(self) -> str:
        nodes = self.num_gpus // self.gpus_per_node
        return f"{self.num_gpus} {self.gpu.name} ({nodes} node{'s' * (nodes > 1)} of {self.gpus_per_node})"


def default_network(gpu: Gpu, gpus_per_node: int) -> Network:
    """The links of a GPU's data sheet, and the network cards of a usual node."""
    return Network(
        name=f"{gpu.name}'s",
        link_bytes_per_s=gpu.link_bytes_per_s,
        link_latency_s=5e-6,
        ranks_per_node=gpus_per_node,
        nic_bytes_per_s=gpu.nic_bytes_per_s * gpus_per_node / 8,
        nic_latency_s=10e-6,
    )


def gpu_named(name: str) -> Gpu:
    """A GPU by its name.

    Raises:
        ConfigError: there is none of that name; the message has the nearest.
    """
    wanted = name.strip().lower().replace("_", "-")
    wanted = _SYNONYMS.get(wanted, wanted)
    if wanted in GPUS:
        return GPUS[wanted]
    near = nearest(wanted, GPUS)
    raise ConfigError(
        explain(
            got=f"GPU {name!r}",
            rule=f"the known GPUs are {', '.join(GPUS)}",
            remedy=f"The nearest name is {near}" if near else "Choose one of them, the most similar one",
        )
    )


def with_memory(gpu: Gpu, gib: float) -> Gpu:
    """The same GPU with another amount of memory, in GiB."""
    return replace(gpu, memory_bytes=int(gib * GIB))
