"""Gradients of a whole model, assembled from its tensor- and pipeline-parallel pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lightseq.megatron.rows_by_rank import SECTIONS
from megatron_lightseq.training.setup import Training, gpt_model

Gradients = dict[str, list[Tensor]]
"""By parameter name; one gradient per replica, which must all be equal."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One rank's part of one parameter's gradient."""

    name: str
    """Of the parameter in an unsharded model."""
    replica: int
    """Index among the ranks that hold the same gradient: data- and context-parallel ranks; differs for experts."""
    num_replicas: int
    tensor_rank: int
    num_tensor_ranks: int
    dim: int | None
    """The dimension that tensor parallelism shards; None for a parameter that every rank holds entirely."""
    sections: tuple[int, ...]
    """Sizes along ``dim`` of the blocks that are sharded separately: gate and up projection, if they share a matrix."""
    gradient: Tensor


def pieces_of(training: Training) -> list[Piece]:
    """This rank's pieces after a training step; collective over data- and context-parallel ranks."""
    if training.config.parallel.use_distributed_optimizer:
        _gather_shards(training)
    groups = training.collection
    found = []
    for name, parameter in _named_parameters(training):
        of_experts = ".experts." in name
        replicas = groups.expt_dp if of_experts else groups.dp_cp
        tensor_ranks = groups.expt_tp if of_experts else groups.tp
        is_sharded = getattr(parameter, "tensor_model_parallel", False)
        dim = parameter.partition_dim if is_sharded else None
        found.append(
            Piece(
                name=name,
                replica=replicas.rank(),
                num_replicas=replicas.size(),
                tensor_rank=tensor_ranks.rank(),
                num_tensor_ranks=tensor_ranks.size(),
                dim=dim,
                sections=() if dim is None else _sections(training, name, parameter, dim),
                gradient=parameter.main_grad.detach().float().cpu().clone(),
            )
        )
    return found


def _sections(training: Training, name: str, parameter: Any, dim: int) -> tuple[int, ...]:
    size = parameter.shape[dim]
    if training.config.model.swiglu and "linear_fc1" in name:
        return size // 2, size // 2
    found: tuple[int, ...] = getattr(parameter, SECTIONS, (size,))
    return found


def _named_parameters(training: Training) -> Iterator[tuple[str, Any]]:
    """Parameters by their names in an unsharded model, with global numbers of layers and experts, without a tied output
    layer."""
    tied = not training.config.model.untie_embeddings_and_output_weights
    for chunk in training.chunks:
        model = gpt_model(chunk)
        numbers = {
            f"decoder.layers.{index}.": f"decoder.layers.{layer.layer_number - 1}."
            for index, layer in enumerate(model.decoder.layers)
        }
        for name, module in model.named_modules():
            for index, expert in enumerate(getattr(module, "local_expert_indices", ())):
                local = f"{name}.experts.local_experts.{index}."
                numbers[local] = f"{_renamed(name + '.', numbers)}experts.local_experts.{expert}."
        for name, parameter in model.named_parameters():
            if not (tied and name == "output_layer.weight"):
                yield _renamed(name, numbers), parameter


def _renamed(name: str, numbers: dict[str, str]) -> str:
    """The name with the longest matching prefix replaced."""
    prefix = max((prefix for prefix in numbers if name.startswith(prefix)), key=len, default="")
    return numbers.get(prefix, "") + name[len(prefix) :]


def _gather_shards(training: Training) -> None:
    """Complete the gradient buffers: with a sharded optimizer, each rank has reduced only its shard of them."""
    for chunk in training.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def assemble(pieces: list[Piece]) -> Gradients:
    """The whole gradient of every parameter, once per replica."""
    by_name: dict[str, dict[tuple[int, int], Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, {})[piece.replica, piece.tensor_rank] = piece
    whole: Gradients = {}
    for name, grid in by_name.items():
        first = next(iter(grid.values()))
        replicas, tensor_ranks = range(first.num_replicas), range(first.num_tensor_ranks)
        assert len(grid) == len(replicas) * len(tensor_ranks), (
            f"{name}: {sorted(grid)} of {replicas} x {tensor_ranks}"
        )
        whole[name] = [_join([grid[replica, rank] for rank in tensor_ranks]) for replica in replicas]
    return whole


def _join(pieces: list[Piece]) -> Tensor:
    first = pieces[0]
    if first.dim is None or len(pieces) == 1:
        return first.gradient
    blocks = [piece.gradient.split(first.sections, dim=first.dim) for piece in pieces]
    joined = [block[part] for part in range(len(first.sections)) for block in blocks]
    return torch.cat(joined, dim=first.dim)
