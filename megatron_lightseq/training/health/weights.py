"""Weights that several ranks hold copies of, compared bit by bit: a flipped bit in one copy spreads to all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from megatron_lightseq.errors import LightSeqError, explain
from megatron_lightseq.training.setup import Training
from megatron_lightseq.training.step import parameters_in_place


def check_replicas(training: Training, step: int) -> None:
    """Compare a hash of every parameter over the ranks that hold the same one. Collective.

    These are the data and context parallel ranks, and for parameters that are not cut, the tensor parallel ranks too.

    Raises:
        LightSeqError: copies differ; the message names the parameter and the ranks, and every rank raises it.
    """
    with parameters_in_place(training):
        own = dict(_digests(training))
    known: list[dict[str, tuple[Any, str]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(known, own)
    different = _first_difference(known)
    if different is None:
        return
    name, minority, others = different
    hosts = minority if len(minority) < len(others) else [*minority, *others]
    raise LightSeqError(
        explain(
            got=f"after step {step}, the copies of {name} on ranks {minority} and {others} differ",
            rule="ranks that hold the same weights must hold the same bits",
            remedy=f"Test the memory of the hosts of ranks {hosts}, and restart: the run continues from its last "
            "checkpoint",
        )
    )


def _digests(training: Training) -> Iterator[tuple[str, tuple[Any, str]]]:
    """By name: which part of the parameter this rank holds, and its hash."""
    groups = training.collection
    for index, model in enumerate(training.models):
        for name, parameter in model.named_parameters():
            of_experts = ".experts." in name
            tensor = groups.expt_tp if of_experts else groups.tp
            cut = bool(getattr(parameter, "tensor_model_parallel", False)) or of_experts
            part = (
                index,
                groups.pp.rank(),
                tensor.rank() if cut else 0,
                groups.ep.rank() if of_experts else 0,
            )
            content = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            yield name, (part, xxhash.xxh3_128_hexdigest(content))


def _first_difference(
    known: list[dict[str, tuple[Any, str]]],
) -> tuple[str, list[int], list[int]] | None:
    """A parameter whose copies differ, the ranks with the rarest hash, and the other ranks."""
    copies: dict[tuple[str, Any], dict[int, str]] = {}
    for rank, names in enumerate(known):
        for name, (part, digest) in names.items():
            copies.setdefault((name, part), {})[rank] = digest
    for (name, _), by_rank in copies.items():
        if len(counts := Counter(by_rank.values())) > 1:
            rarest = min(counts, key=lambda digest: counts[digest])
            minority = [rank for rank, digest in by_rank.items() if digest == rarest]
            return name, minority, [rank for rank in by_rank if rank not in minority]
    return None
