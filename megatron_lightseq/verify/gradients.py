"""Gradients of a whole model, put together from its tensor- and pipeline-parallel pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lightseq.groups import rank_in
from megatron_lightseq.training.setup import Training, gpt_model

Gradients = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Piece:
    """One rank's part of one parameter's gradient."""

    name: str
    """Of the parameter in a model that is not cut."""
    replica: int
    """Number among the data- and context-parallel ranks, which must all hold the same."""
    tensor_rank: int
    dim: int | None
    """The dimension that tensor parallelism cuts; None for a parameter that every rank holds whole."""
    parts: int
    """Blocks that are cut each for itself: 2 where gate and up projection lie in one matrix."""
    gradient: Tensor


def pieces_of(training: Training) -> list[Piece]:
    """This rank's pieces, after a step; collective over data- and context-parallel ranks."""
    if training.config.parallel.use_distributed_optimizer:
        _gather_shards(training)
    replica = training.collection.dp_cp.rank()
    found = []
    for name, parameter in _named_parameters(training):
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        gated = training.config.model.swiglu and "mlp.linear_fc1" in name
        found.append(
            Piece(
                name=name,
                replica=replica,
                tensor_rank=rank_in(training.groups.tp),
                dim=parameter.partition_dim if is_cut else None,
                parts=2 if gated else 1,
                gradient=parameter.main_grad.detach().float().cpu().clone(),
            )
        )
    return found


def _named_parameters(training: Training) -> Iterator[tuple[str, Any]]:
    """Parameters by their names in an uncut model: layers counted through, a tied output layer left out."""
    tied = not training.config.model.untie_embeddings_and_output_weights
    for chunk in training.chunks:
        model = gpt_model(chunk)
        numbers = {
            f"decoder.layers.{index}.": f"decoder.layers.{layer.layer_number - 1}."
            for index, layer in enumerate(model.decoder.layers)
        }
        for name, parameter in model.named_parameters():
            if tied and name == "output_layer.weight":
                continue
            prefix = next((prefix for prefix in numbers if name.startswith(prefix)), "")
            yield numbers.get(prefix, "") + name[len(prefix) :], parameter


def _gather_shards(training: Training) -> None:
    """Complete the gradient buffers: with a sharded optimizer a rank has reduced only its own part of each."""
    for chunk in training.chunks:
        for buffer in chunk.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def assemble(pieces: list[Piece]) -> list[Gradients]:
    """The whole gradients, one dictionary for each data- and context-parallel replica."""
    by_parameter: dict[tuple[int, str], dict[int, Piece]] = {}
    for piece in pieces:
        by_parameter.setdefault((piece.replica, piece.name), {})[piece.tensor_rank] = piece
    replicas = sorted({replica for replica, _ in by_parameter})
    whole: dict[int, Gradients] = {replica: {} for replica in replicas}
    for (replica, name), by_rank in by_parameter.items():
        whole[replica][name] = _join([by_rank[rank] for rank in sorted(by_rank)])
    return [whole[replica] for replica in replicas]


def _join(pieces: list[Piece]) -> Tensor:
    first = pieces[0]
    if first.dim is None or len(pieces) == 1:
        return first.gradient
    blocks = [piece.gradient.chunk(first.parts, dim=first.dim) for piece in pieces]
    return torch.cat([block[part] for part in range(first.parts) for block in blocks], dim=first.dim)
