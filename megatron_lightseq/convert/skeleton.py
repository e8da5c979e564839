"""A recipe's model without its numbers: every tensor that its checkpoints hold, and where."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.megatron.cpu import platform as cpu_platform
from megatron_lightseq.megatron.spec import gpt_layer_spec
from megatron_lightseq.training.setup import build_model, initialize_parallel
from megatron_lightseq.training.translate import transformer_config

SINGLE = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "num_layers_per_virtual_pipeline_stage": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "sequence_parallel": False,
    "moe_grouped_gemm": False,
    "mlp_tile_tokens": None,
    "loss_tile_tokens": None,
    "cp_method": "lightseq",
    "cp_ulysses_size": None,
    "cp_comm_type": (),
    "cp_layout": "auto",
    "global_batch_size": 1,
    "micro_batch_size": 1,
    "use_distributed_optimizer": False,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
}
"""Keys that divide the work and do not change what a checkpoint holds, for one process."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one tensor of the model, as the checkpoint stores it."""

    key: str
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    """In the checkpoint, where layers and experts are dimensions of their own."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the model."""

    name: str
    """In the model's state dict, e.g. ``decoder.layers.3.mlp.linear_fc1.weight``."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """Its rows, in order."""

    @property
    def rows(self) -> list[int]:
        """Of each piece."""
        rest = torch.Size(self.shape[1:]).numel()
        return [torch.Size(piece.sizes).numel() // rest for piece in self.pieces]


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What :func:`skeleton_of` returns."""

    state: dict[str, Any]
    """Megatron's sharded state dict, with tensors on the meta device."""
    entries: tuple[Entry, ...]


@contextmanager
def single_process() -> Iterator[None]:
    """A world of one process, in which a model can be built.

    Raises:
        ConfigError: torch.distributed is initialised already.
    """
    if dist.is_initialized():
        raise ConfigError(
            explain(
                got=f"a world of {dist.get_world_size()} ranks",
                rule="a model is converted by one process, which starts a world of its own",
                remedy="Run it without torchrun, or before init_process_group",
            )
        )
    if not torch.cuda.is_available():
        cpu_platform.activate()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def skeleton_of(config: PretrainConfig, padded_vocab_size: int) -> Skeleton:
    """The tensors of a recipe's model; call it inside :func:`single_process`."""
    single = with_values(config, **SINGLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        initialize_parallel(single)
        model_parallel_cuda_manual_seed(0)
        model_config = transformer_config(single)
        model_config.perform_initialization = False
        with torch.device("meta"):
            model = build_model(single, model_config, gpt_layer_spec(single), padded_vocab_size)
        if single.training.bf16:
            model = model.bfloat16()
            for module in model.modules():
                if getattr(module, "expert_bias", None) is not None:
                    module.expert_bias = module.expert_bias.float()  # as Megatron's routers keep it
        state = {"model": model.sharded_state_dict(metadata={})}
    return Skeleton(state, tuple(_entries(state["model"])))


def _entries(state: dict[str, Any]) -> Iterator[Entry]:
    for name, value in state.items():
        if isinstance(value, ShardedTensorFactory):
            parts = value.build()
            assert isinstance(parts, list), f"{name}: the sections of a matrix come as a list"
            yield Entry(name, tuple(value.data.shape), tuple(map(_piece, parts)))
        elif isinstance(value, ShardedTensor):
            assert value.data is not None
            yield Entry(name, tuple(value.data.shape), (_piece(value),))


def _piece(tensor: ShardedTensor) -> Piece:
    sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    return Piece(tensor.key, tuple(tensor.global_offset), sizes)
