"""Networks and devices that need not be here: what transfers and kernels take on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_lightseq.errors import ConfigError, explain


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Ranks with a link each, in nodes that share a network card.

    All messages that start together share their ports fairly: a message takes as long as the busiest port on its
    way needs for all that goes through it, and a latency.
    """

    name: str
    link_bytes_per_s: float
    """Of a rank's link to the other ranks of its node, each way."""
    link_latency_s: float = 0.0
    ranks_per_node: int | None = None
    """Consecutive ranks that share a node; None for all."""
    nic_bytes_per_s: float = float("inf")
    """Of a node's network card, each way, shared by all ranks of the node."""
    nic_latency_s: float = 0.0

    @staticmethod
    def parse(name: str) -> Network:
        """One of the networks that have a name: ``nvlink``, ``nvlink+100gbps``, ``nvlink+8x400gbps``.

        Raises:
            ConfigError: no network has that name.
        """
        if name not in NETWORKS:
            raise ConfigError(
                explain(
                    got=f"network {name!r}",
                    rule=f"the networks are {', '.join(NETWORKS)}",
                    remedy="Choose one, or describe yours as a schedule.Network",
                )
            )
        return NETWORKS[name]

    def node(self, rank: int) -> int:
        """The node of a rank."""
        return 0 if self.ranks_per_node is None else rank // self.ranks_per_node

    def of_one_ring(self, group_size: int) -> Network:
        """What one of ``group_size`` rings sees that run side by side, with one rank in every group of adjacent
        ranks of that size.
        """
        if self.ranks_per_node is None or group_size == 1:
            return self
        sharing = min(group_size, self.ranks_per_node)
        return replace(
            self,
            ranks_per_node=max(1, self.ranks_per_node // group_size),
            nic_bytes_per_s=self.nic_bytes_per_s / sharing,
        )


_NVLINK = Network(name="nvlink", link_bytes_per_s=450e9, link_latency_s=5e-6)  # H100, fourth generation

NETWORKS = {
    network.name: network
    for network in (
        _NVLINK,
        # The paper's second cluster: nodes of 8 with one 100 Gbps InfiniBand card (DistFlashAttn, section 4).
        replace(
            _NVLINK, name="nvlink+100gbps", ranks_per_node=8, nic_bytes_per_s=12.5e9, nic_latency_s=10e-6
        ),
        # DGX H100: a 400 Gbps card for each of 8 ranks.
        replace(
            _NVLINK, name="nvlink+8x400gbps", ranks_per_node=8, nic_bytes_per_s=400e9, nic_latency_s=10e-6
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """How fast attention kernels run."""

    name: str = "H100 bf16"
    forward_flops_per_s: float = 500e12
    backward_flops_per_s: float = 400e12


def transfer_times(
    messages: Sequence[tuple[int, int, int]], ready: Sequence[float], network: Network
) -> list[float]:
    """When each rank has finished its transfers.

    Args:
        messages: (source, destination, bytes) of all that travels together.
        ready: when each rank can begin; also what a rank without messages gets.
        network: what they travel over.
    """
    size = len(ready)
    out_s, in_s = [0.0] * size, [0.0] * size
    nodes = [network.node(rank) for rank in range(size)]
    nic_out_s, nic_in_s = [0.0] * size, [0.0] * size
    per_byte, per_nic_byte = 1 / network.link_bytes_per_s, 1 / network.nic_bytes_per_s
    for src, dst, num_bytes in messages:
        out_s[src] += num_bytes * per_byte
        in_s[dst] += num_bytes * per_byte
        if nodes[src] != nodes[dst]:
            nic_out_s[nodes[src]] += num_bytes * per_nic_byte
            nic_in_s[nodes[dst]] += num_bytes * per_nic_byte
    done = list(ready)
    for src, dst, _ in messages:
        seconds, latency = max(out_s[src], in_s[dst]), network.link_latency_s
        if nodes[src] != nodes[dst]:
            seconds = max(seconds, nic_out_s[nodes[src]], nic_in_s[nodes[dst]])
            latency = network.nic_latency_s
        end = max(ready[src], ready[dst]) + seconds + latency
        done[src] = max(done[src], end)
        done[dst] = max(done[dst], end)
    return done
