"""Joining the other ranks: environment, store, control channel, preflight and process group, in that order."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_lightseq.config import PretrainConfig, ResolvedConfig
from megatron_lightseq.kernels.registry import resolve_kernel
from megatron_lightseq.megatron.cpu import platform as cpu_platform
from megatron_lightseq.schedule import Direction
from megatron_lightseq.training.job.control_channel import ControlChannel
from megatron_lightseq.training.job.failure import FaultLimits
from megatron_lightseq.training.job.launch import Launch
from megatron_lightseq.training.job.preflight import agree, describe, package_hash
from megatron_lightseq.training.job.waits import Waits, counting
from megatron_lightseq.training.job.words import ranges

_CONTROL_TIMEOUT = timedelta(seconds=5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """This process's place among the ranks."""

    launch: Launch
    channel: ControlChannel
    device: torch.device
    backend: str
    """``nccl`` or ``gloo``."""
    kernel: str
    """Name of the attention kernel that runs."""
    waits: Waits = field(default_factory=Waits)
    """How long this rank has waited for others."""


@contextmanager
def join(resolved: ResolvedConfig, corpus: str) -> Iterator[Job]:
    """Meet the other ranks, make sure that all run the same thing, and initialise ``torch.distributed``.

    Inside the block, an error of another rank arrives as a PeerFailureError; see
    :meth:`~megatron_lightseq.training.job.control_channel.ControlChannel.guard`.

    Args:
        resolved: configuration of the run.
        corpus: fingerprint of the data that this rank reads. Folders of the same name may have different contents on
            different hosts, and ranks that read different texts would silently train on a mixture.

    Raises:
        ConfigError: the ranks disagree; raised before any collective.
        PeerFailureError: a rank did not come, or failed first.
    """
    config = resolved.config
    launch = Launch.from_environment()
    timeout_s = 60.0 * config.parallel.distributed_timeout_minutes
    device = _choose_device(launch)
    backend = _choose_backend(config, device)
    store = _rendezvous(launch, timeout_s)
    host, port, prefix = store.host, store.port, launch.store_prefix

    def connect() -> dist.Store:
        client = dist.TCPStore(
            host, port, None, False, timeout=_CONTROL_TIMEOUT, wait_for_workers=False, multi_tenant=True
        )
        return dist.PrefixStore(prefix, client)

    waits = Waits()
    channel = ControlChannel(
        connect,
        rank=launch.rank,
        world_size=launch.world_size,
        limits=fault_limits(config),
        store_host=launch.store_host,
        waits=waits,
    )
    channel.start()
    with channel.guard(), counting(waits):
        kernel = kernel_name(config, device)
        agree(
            dist.PrefixStore(prefix, store),
            {**facts(resolved, device, kernel), "corpus": corpus},
            rank=launch.rank,
            world_size=launch.world_size,
            timeout_s=min(timeout_s, 120.0),
        )
        _stay_on_loopback(launch)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"{prefix}/pg", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        yield Job(launch=launch, channel=channel, device=device, backend=backend, kernel=kernel, waits=waits)
        channel.finish()
    dist.destroy_process_group()
    channel.leave()


def fault_limits(config: PretrainConfig) -> FaultLimits:
    """How long to wait for a rank, as configured."""
    health = config.health
    return FaultLimits(
        silence_s=health.rank_silence_seconds,
        suspect_silence_s=min(FaultLimits().suspect_silence_s, health.rank_silence_seconds),
        step_floor_s=health.step_timeout_seconds,
        step_factor=health.step_timeout_factor,
        setup_s=60.0 * config.parallel.distributed_timeout_minutes,
    )


def facts(resolved: ResolvedConfig, device: torch.device, kernel: str) -> dict[str, str]:
    """What all ranks must agree on before the first collective, as text by name.

    Among it are the fingerprints of the schedules that the attention layers will run, of every kind of layer.
    """
    more = {"device": device.type, "num_threads": str(torch.get_num_threads()), "kernel": kernel}
    more["MLS_CPU_ISA"] = os.environ.get("MLS_CPU_ISA", "(unset)")
    more["source"] = package_hash()
    if resolved.attention is not None:
        kinds = resolved.attention.kinds
        for kind in kinds:
            layers = f" of layers {ranges(kind.layers)}" if len(kinds) > 1 else ""
            for direction in Direction:
                fingerprint = kind.schedules.schedule(direction).fingerprint
                more[f"{direction} schedule{layers}"] = fingerprint
    return describe(resolved.config, **more)


def kernel_name(config: PretrainConfig, device: torch.device) -> str:
    """The name of the attention kernel that the run will use."""
    if config.context.cp_method == "megatron":
        return "megatron"
    model = config.model
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    q = torch.empty(1, 1, model.num_attention_heads, model.head_dim, dtype=dtype, device=device)
    k = torch.empty(1, 1, model.query_groups, model.head_dim, dtype=dtype, device=device)
    v = torch.empty(1, 1, model.query_groups, model.value_head_dim, dtype=dtype, device=device)
    return str(resolve_kernel(config.context.cp_kernel, q, k, v).name)


def _choose_device(launch: Launch) -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
        return torch.device("cuda", launch.local_rank)
    cpu_platform.activate()
    return torch.device("cpu")


def _choose_backend(config: PretrainConfig, device: torch.device) -> str:
    if config.parallel.distributed_backend != "auto":
        return config.parallel.distributed_backend
    return "nccl" if device.type == "cuda" else "gloo"


def _rendezvous(launch: Launch, timeout_s: float) -> dist.TCPStore:
    timeout = timedelta(seconds=timeout_s)
    if launch.world_size == 1 and "MASTER_PORT" not in os.environ:
        return dist.TCPStore("127.0.0.1", 0, 1, True, timeout=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return store


def _stay_on_loopback(launch: Launch) -> None:
    """On one machine, keep gloo and NCCL off the network; then a host name that does not resolve cannot stop them."""
    if launch.world_size == launch.local_world_size and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
