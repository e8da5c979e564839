"""Joining the other ranks: environment, store, control channel, preflight, process group, in that order."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.resolved import methods
from megatron_lightseq.kernels.registry import resolve_kernel
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.cpu import platform as cpu_platform
from megatron_lightseq.schedule import build
from megatron_lightseq.training.job.control_channel import ControlChannel, FaultLimits
from megatron_lightseq.training.job.launch import Launch
from megatron_lightseq.training.job.preflight import agree, describe

_CONTROL_TIMEOUT = timedelta(seconds=5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """This process's place among the ranks."""

    launch: Launch
    channel: ControlChannel
    device: torch.device
    backend: str


@contextmanager
def join(config: PretrainConfig, corpus: str) -> Iterator[Job]:
    """Meet the other ranks, make sure that all run the same thing, and initialise ``torch.distributed``.

    ``corpus`` is the fingerprint of what this rank reads: hosts may have folders of one name and other contents, and
    ranks that cut different texts would train on a mixture without an error.

    Inside, an error of another rank arrives as a PeerFailureError; see
    :meth:`~megatron_lightseq.training.job.control_channel.ControlChannel.guard`.

    Raises:
        ConfigError: the ranks disagree, before any collective.
        PeerFailureError: a rank did not come, or failed first.
    """
    launch = Launch.from_environment()
    timeout_s = 60.0 * config.parallel.distributed_timeout_minutes
    device = _choose_device(launch)
    backend = _choose_backend(config, device)
    store = _rendezvous(launch, timeout_s)
    host, port, prefix = store.host, store.port, _store_prefix(launch)

    def connect() -> dist.Store:
        client = dist.TCPStore(
            host, port, None, False, timeout=_CONTROL_TIMEOUT, wait_for_workers=False, multi_tenant=True
        )
        return dist.PrefixStore(prefix, client)

    channel = ControlChannel(
        connect,
        rank=launch.rank,
        world_size=launch.world_size,
        limits=FaultLimits(setup_s=timeout_s),
    )
    channel.start()
    with channel.guard():
        agree(
            dist.PrefixStore(prefix, store),
            {**facts(config, device), "corpus": corpus},
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
        yield Job(launch=launch, channel=channel, device=device, backend=backend)
    channel.close()
    dist.destroy_process_group()


def facts(config: PretrainConfig, device: torch.device) -> dict[str, str]:
    """What all ranks must agree on before the first collective, as text by name."""
    more = {
        "device": device.type,
        "num_threads": str(torch.get_num_threads()),
        "kernel": kernel_name(config, device),
    }
    if config.context.cp_method != "megatron":
        layout = SequenceLayout(config.context.layout_name, config.parallel.context_parallel_size)
        for direction, method in methods(config).items():
            schedule = build(
                method,
                layout,
                direction=direction,
                seq_length=config.training.seq_length,
            )
            more[f"{direction} schedule"] = schedule.fingerprint
    return describe(config, **more)


def kernel_name(config: PretrainConfig, device: torch.device) -> str:
    """The attention kernel that the run will use."""
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


def _store_prefix(launch: Launch) -> str:
    """Keys of one attempt.

    torchrun may keep one store over restarts, with the dead ranks' keys in it. Over several machines it makes
    a new one (the launch scripts ask it to), and each machine counts its own restarts.
    """
    return f"mls/{launch.attempt}" if launch.world_size == launch.local_world_size else "mls"


def _stay_on_loopback(launch: Launch) -> None:
    """On one machine gloo need not listen to the network; a name that does not resolve cannot stop it, either."""
    if launch.world_size == launch.local_world_size and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
