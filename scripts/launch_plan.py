"""The number of processes that a recipe needs on this node, and of threads per process; for scripts/pretrain_gpt.sh.

    python scripts/launch_plan.py [FILE.yaml ...] [--key value ...]

prints one line, `PROCESSES THREADS DEVICE`, where DEVICE is `gpu` or `cpu`. A recipe that breaks a rule is refused
here, with all broken rules in one report, before any process starts. Reads NNODES and NPROC_PER_NODE. Does not import
torch, so it takes a fraction of a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from megatron_lightseq.config.load import parse_config
from megatron_lightseq.config.rules import Machine
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.config.validate import validate
from megatron_lightseq.errors import ConfigError, explain


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """The machines, as far as the launcher knows."""

    num_gpus: int
    num_cores: int
    num_nodes: int = 1
    processes: int | None = None
    """Processes per node requested by the user; None to derive it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to start on each node."""

    processes: int
    threads: int
    device: str


def plan(config: PretrainConfig, node: Node) -> Plan:
    """The plan for one node: as many model replicas as the GPUs hold, or one replica on CPUs if they hold none.

    On a single node, the number of replicas is the largest one that the GPUs hold and that divides the global batch. On
    several nodes every GPU gets a process, and a model that does not fill them is refused by the configuration's rules.

    Raises:
        ConfigError: The model cannot be divided evenly over CPU nodes.
    """
    replica = config.parallel.model_parallel_size
    device = "gpu" if node.num_gpus * node.num_nodes >= replica else "cpu"
    if node.processes is not None:
        processes = node.processes
        device = "gpu" if node.num_gpus >= processes else "cpu"
    elif device == "gpu" and node.num_nodes > 1:
        processes = node.num_gpus
    elif device == "gpu":
        processes = replica * _replicas(config, node.num_gpus // replica)
    elif replica % node.num_nodes == 0:
        processes = replica // node.num_nodes
    else:
        raise ConfigError(
            explain(
                got=f"{replica} ranks (TP * PP * CP) on {node.num_nodes} nodes without GPUs",
                rule="every node gets the same number of processes",
                remedy="Set NPROC_PER_NODE, or parallel sizes whose product is a multiple of the nodes",
            )
        )
    return Plan(processes=processes, threads=max(1, node.num_cores // processes), device=device)


def _replicas(config: PretrainConfig, most: int) -> int:
    batches = config.training.global_batch_size // config.training.micro_batch_size
    return max((count for count in range(1, most + 1) if batches % count == 0), default=1)


def visible_gpus() -> int:
    """Number of GPUs that torch will find, without importing it; 0 for a CPU build of torch."""
    if metadata.version("torch").endswith("+cpu"):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def this_node() -> Node:
    """The node that this process runs on, with NNODES and NPROC_PER_NODE from the environment."""
    processes = os.environ.get("NPROC_PER_NODE")
    return Node(
        num_gpus=visible_gpus(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        num_nodes=int(os.environ.get("NNODES", "1")),
        processes=int(processes) if processes else None,
    )


def main(arguments: Sequence[str]) -> int:
    """Print the plan; returns the exit status."""
    node = this_node()
    try:
        config = parse_config(arguments)
        chosen = plan(config, node)
        gpus = node.num_gpus if chosen.device == "gpu" else 0
        validate(config, Machine(world_size=chosen.processes * node.num_nodes, num_gpus=gpus))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if node.num_gpus and chosen.device == "cpu":
        print(
            f"note: running on CPUs, because {node.num_gpus} GPU(s) per node are fewer than the ranks need. Smaller "
            "parallel sizes (such as --context-parallel-size 1) would run on the GPUs.",
            file=sys.stderr,
        )
    print(chosen.processes, chosen.threads, chosen.device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
