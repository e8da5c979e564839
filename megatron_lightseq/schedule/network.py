"""Descriptions of networks and devices, for predicting how long transfers and kernels take on them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_lightseq.errors import ConfigError, explain


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Ranks with one link each, in nodes that share a network card.

    All messages that start together share ports fairly: a message takes as long as the busiest port on its way
    needs for all of its traffic, plus a latency.
    """

    name: str
    link_bytes_per_s: float
    """Rate of a rank's link to the other ranks of its node, in each direction."""
    link_latency_s: float = 0.0
    ranks_per_node: int | None = None
    """Consecutive ranks that share a node; None if all do."""
    nic_bytes_per_s: float = float("inf")
    """Rate of a node's network card, in each direction, shared by all ranks of the node."""
    nic_latency_s: float = 0.0

    @staticmethod
    def parse(text: str) -> Network:
        """A network by its name, or by its numbers.

        Names are those in ``NETWORKS``. Numbers: ``link=450GB/s, latency=5us, ranks_per_node=8, nic=50GB/s,
        nic_latency=10us``, of which only ``link`` is required; rates are in GB/s, MB/s, Gbit/s or Mbit/s, in each
        direction, and times in s, ms or us.

        Raises:
            ConfigError: the text is neither.
        """
        if text in NETWORKS:
            return NETWORKS[text]
        parts = [part.strip().partition("=") for part in text.split(",")]
        values = {key: _number(_UNITS_OF.get(key, {}), value) for key, _, value in parts}
        if "link" in values and len(values) == len(parts) and values.keys() <= _UNITS_OF.keys():
            found = {_FIELD_OF[key]: value for key, value in values.items() if value is not None}
            if len(found) == len(parts) and float(found.get("ranks_per_node", 1)).is_integer():
                nodes = {key: int(value) for key, value in found.items() if key == "ranks_per_node"}
                return Network(name=text, **{**found, **nodes})  # type: ignore[arg-type]
        raise ConfigError(
            explain(
                got=f"network {text!r}",
                rule=f"the networks are {', '.join(NETWORKS)}, or numbers: link=450GB/s, latency=5us, "
                "ranks_per_node=8, nic=50GB/s, nic_latency=10us, of which only link is required",
                remedy="Choose one of them, or describe your network in numbers",
            )
        )

    def node(self, rank: int) -> int:
        """The node of a rank."""
        return 0 if self.ranks_per_node is None else rank // self.ranks_per_node

    def of_one_ring(self, group_size: int) -> Network:
        """The network as seen by one of ``group_size`` rings that run concurrently, when each ring has one rank in
        every group of ``group_size`` adjacent ranks.
        """
        if self.ranks_per_node is None or group_size == 1:
            return self
        sharing = min(group_size, self.ranks_per_node)
        return replace(
            self,
            ranks_per_node=max(1, self.ranks_per_node // group_size),
            nic_bytes_per_s=self.nic_bytes_per_s / sharing,
        )


_RATES = {"GB/s": 1e9, "MB/s": 1e6, "Gbit/s": 1e9 / 8, "Mbit/s": 1e6 / 8}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_UNITS_OF = {
    "link": _RATES,
    "latency": _TIMES,
    "ranks_per_node": {"": 1.0},
    "nic": _RATES,
    "nic_latency": _TIMES,
}
_FIELD_OF = {
    "link": "link_bytes_per_s",
    "latency": "link_latency_s",
    "ranks_per_node": "ranks_per_node",
    "nic": "nic_bytes_per_s",
    "nic_latency": "nic_latency_s",
}


def _number(units: Mapping[str, float], text: str) -> float | None:
    """A positive finite number in one of ``units``, or None."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None or found[2] not in units:
        return None
    value = float(found[1]) * units[found[2]]
    return value if value > 0 else None


_NUMBER = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?)\s*([A-Za-z/]*)")

_NVLINK = Network(name="nvlink", link_bytes_per_s=450e9, link_latency_s=5e-6)  # H100, fourth generation

NETWORKS = {
    network.name: network
    for network in (
        _NVLINK,
        # The paper's second cluster: nodes of 8 with one 100 Gbps InfiniBand card (DistFlashAttn, section 4).
        replace(
            _NVLINK, name="nvlink+100gbps", ranks_per_node=8, nic_bytes_per_s=12.5e9, nic_latency_s=10e-6
        ),
        # DGX H100: one 400 Gbps card for each of 8 ranks.
        replace(
            _NVLINK, name="nvlink+8x400gbps", ranks_per_node=8, nic_bytes_per_s=400e9, nic_latency_s=10e-6
        ),
    )
}
"""Networks by the names that ``--cp-network`` accepts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """How fast attention kernels run."""

    name: str = "H100 bf16"
    forward_flops_per_s: float = 500e12
    backward_flops_per_s: float = 400e12


def transfer_times(
    messages: Sequence[tuple[int, int, int]], ready: Sequence[float], network: Network
) -> list[float]:
    """The times at which the ranks have finished their transfers, in seconds.

    Args:
        messages: (source, destination, bytes) of all transfers that start together.
        ready: when each rank can begin; also the result for a rank without messages.
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
