"""Builds, warms up and measures one system on one rank. A task for :mod:`tools.ranks`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lightseq.attention import AttentionStats
from megatron_lightseq.megatron.cpu import platform as cpu_platform
from megatron_lightseq.megatron.transformer_impl import use_transformer_engine
from megatron_lightseq.tools.compare.job import VOCAB_SIZE, Job, Measurement, StepMeasurement
from megatron_lightseq.tools.compare.padding import PaddedWeightNames
from megatron_lightseq.tools.compare.sdpa import sdpa_layer_spec
from megatron_lightseq.tools.compare.systems import SYSTEMS
from megatron_lightseq.tools.compare.traffic import Traffic, watch_traffic
from megatron_lightseq.tools.memory import limit_memory, peak_tensor_bytes
from megatron_lightseq.tools.ranks import RankContext
from megatron_lightseq.training.data.documents import ReadCounts, read_documents
from megatron_lightseq.training.data.sources import find_stdlib_files
from megatron_lightseq.training.reporting.memory import peak_resident_bytes
from megatron_lightseq.training.setup import Training, build_training, initialize_parallel, resolve_here
from megatron_lightseq.training.step import train_step

_CEILING_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows of the square matrices: large enough for the device to reach its peak."""
_CEILING_SECONDS = 0.5


def answer(request: str, context: RankContext) -> dict[str, Any]:
    """The task for :func:`megatron_lightseq.tools.ranks.run_task`: takes a :class:`Job`, returns a measurement."""
    return dataclasses.asdict(measure_rank(Job.from_json(request), context))


def measure_rank(job: Job, context: RankContext) -> Measurement:
    """Measure the system of a job on this rank; collective over all ranks of the job."""
    torch.set_num_threads(job.threads)
    if job.pin:
        context.pin()
    if not torch.cuda.is_available():
        cpu_platform.activate()
    context.join()
    dtype = torch.bfloat16 if job.common.training.bf16 else torch.float32
    ceiling = matmul_ceiling(dtype) if job.measure_ceiling else None
    stats, traffic = AttentionStats(), Traffic()
    training = _build(job, stats)
    batches = text_batches(training)
    steps: list[StepMeasurement] = []
    tensor_bytes: int | None = None
    with watch_traffic(traffic):
        for number in range(job.warmup_steps + job.steps):
            steps.append(_timed_step(training, batches, stats, traffic, context.interface))
            steps[-1] = dataclasses.replace(steps[-1], warmup=number < job.warmup_steps)
        resident = peak_resident_bytes()
        if job.profile_memory:
            tensor_bytes = peak_tensor_bytes(lambda: train_step(training, batches))
    return Measurement(
        steps=tuple(steps),
        peak_resident_bytes=resident,
        peak_tensor_bytes=tensor_bytes,
        matmul_flops_per_second=ceiling,
        counts_forwards=not (SYSTEMS[job.system].attention != "lightseq" and use_transformer_engine()),
    )


def _build(job: Job, stats: AttentionStats) -> Training:
    system = SYSTEMS[job.system]
    resolved = resolve_here(system.configure(job.common, job.world_size))
    config = resolved.config
    sdpa = system.attention == "sdpa" and not use_transformer_engine()
    groups = initialize_parallel(
        resolved
    )  # before the limit: each group has threads, and threads have stacks
    if job.memory_budget_bytes is not None:
        limit_memory(job.memory_budget_bytes)
    return build_training(
        resolved,
        vocab_size=VOCAB_SIZE,
        groups=groups,
        stats=stats,
        layer_spec=sdpa_layer_spec(config, stats) if sdpa else None,
        weight_names=PaddedWeightNames(seed=config.training.seed, model=job.common.model),
    )


def _timed_step(
    training: Training,
    batches: Iterator[dict[str, torch.Tensor]],
    stats: AttentionStats,
    traffic: Traffic,
    interface: str | None,
) -> StepMeasurement:
    stats.reset()
    _settle()
    traffic.reset()
    link = link_bytes(interface)
    began, cpu_began = time.perf_counter(), time.process_time()
    result = train_step(training, batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    cpu_seconds = time.process_time() - cpu_began
    measured = dataclasses.asdict(traffic)
    _settle()
    return StepMeasurement(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        loss=result.loss,
        bytes_sent=measured["bytes_sent"],
        attention_bytes_sent=stats.bytes_sent,
        exposed_seconds=None if torch.cuda.is_available() else measured["seconds"],
        attention_forwards=stats.forwards,
        link_bytes_sent=None if link is None else (link_bytes(interface) or 0) - link,
        warmup=False,
    )


def _settle() -> None:
    """Synchronise before and after a step, so that all ranks measure the traffic of the same step."""
    dist.barrier()


HEADER_BYTES = 14 + 20 + 32
"""Headers of a packet: Ethernet, IPv4, and TCP with the timestamps that Linux sends."""
SEGMENT_BYTES = 1500 - 20 - 32
"""Payload of a TCP segment on Ethernet."""


def link_bytes(interface: str | None) -> int | None:
    """Payload that was sent through a network interface in the network namespace of this process.

    The count of the interface, without packet headers and TCP retransmissions, because the size of packets and the
    number of dropped ones vary. Acknowledgements consist only of a header.
    """
    if interface is None:
        return None
    sent = sent_payload(Path("/proc/net/dev").read_text(), interface)
    return None if sent is None else sent - resent_payload(Path("/proc/net/snmp").read_text())


def resent_payload(net_snmp: str) -> int:
    """Bytes that TCP retransmitted, from the text of /proc/net/snmp, assuming full segments."""
    names, values = (line.split() for line in net_snmp.splitlines() if line.startswith("Tcp:"))
    return int(values[names.index("RetransSegs")]) * SEGMENT_BYTES


def sent_payload(net_dev: str, interface: str) -> int | None:
    """Bytes without headers that ``interface`` has sent, from the text of /proc/net/dev; None if it is not listed."""
    for line in net_dev.splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            sent_bytes, sent_packets = map(int, counters.split()[8:10])
            return sent_bytes - sent_packets * HEADER_BYTES
    return None


def text_batches(training: Training) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of real text, the same for every system: source files of the Python standard library, as bytes.

    Tensors are (micro_batch_size, seq_length), as :func:`train_step` expects, for this data-parallel rank.
    """
    settings = training.config.training
    length, micro = settings.seq_length, settings.micro_batch_size
    data_rank = 0 if training.groups.dp is None else training.groups.dp.rank()
    sequences = _sequences(length + 1)
    while True:
        step = torch.stack([next(sequences) for _ in range(settings.global_batch_size)])
        shares = step.view(training.num_microbatches, training.sizes.data, micro, length + 1)
        for text in shares[:, data_rank]:
            yield {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "loss_mask": torch.ones(micro, length),
                "position_ids": torch.arange(length).expand(micro, -1).contiguous(),
            }


def _sequences(length: int) -> Iterator[torch.Tensor]:
    """Consecutive pieces of ``length`` bytes of the standard library, repeated endlessly."""
    held = bytearray()
    while True:
        for document in read_documents(find_stdlib_files(), ReadCounts()):
            held += document.text.encode()
            while len(held) >= length:
                yield torch.frombuffer(held[:length], dtype=torch.uint8).long()
                del held[:length]


def matmul_ceiling(dtype: torch.dtype) -> float:
    """FLOP/s of matrix products on this rank while all ranks compute them: an upper bound for every system."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    size = _CEILING_SIZE[device.type]
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    best = 0.0
    dist.barrier()
    end = time.perf_counter() + _CEILING_SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best
