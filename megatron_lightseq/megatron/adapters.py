"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the linear layers of Megatron's attention and MLPs.

An adapter adds ``(alpha / dim) B A x`` to a layer's output ``W x``. A is (dim, inputs), B is (outputs, dim). One of the
two is cut over tensor-parallel ranks as ``W`` is, by its outputs or by its inputs; the other is whole on every rank.
What travels between the ranks for an adapter is therefore ``dim`` wide. With sequence parallelism the ranks compute the
gradient of the whole one from different tokens; it is marked as norms are, and Megatron adds the parts up.

An adapter is a child of the layer's parent, named ``linear_qkv_lora`` beside ``linear_qkv``, so that the weights beside
it keep their names in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.megatron.seeded_init import WeightNames

SUFFIX = "_lora"
"""Of an adapter's name, after that of its layer."""
PARENTS = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}
"""The part of a transformer layer that has each target."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What all adapters of a model share."""

    dim: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    seed: int
    """Of the initial weights."""

    @property
    def scale(self) -> float:
        """Factor of an adapter's output."""
        return self.alpha / self.dim


class LoraAdapter(MegatronModule):
    """The adapter of one linear layer.

    Args:
        linear: the layer, of which only sizes and groups are read.
        settings: of all adapters.
        init: draws A, U(-1/sqrt(inputs), 1/sqrt(inputs)) as torch's layers and peft do; B is zero.
        is_gated: whether the layer's outputs are two halves, which checkpoints store separately.

    Raises:
        UnsupportedError: the layer is not one of Megatron's local ones.
    """

    def __init__(
        self,
        linear: torch.nn.Module,
        settings: LoraSettings,
        init: Callable[[Tensor], Any],
        *,
        is_gated: bool,
    ) -> None:
        if not isinstance(linear, ColumnParallelLinear | RowParallelLinear):
            raise _not_local(linear)
        super().__init__(linear.config)
        self._is_gated, self._scale, self._dropout = is_gated, settings.scale, settings.dropout
        self._cuts_outputs = isinstance(linear, ColumnParallelLinear)
        cut = {"config": linear.config, "bias": False, "skip_bias_add": False, "tp_group": linear.tp_group}
        if self._cuts_outputs:
            self.linear_in = self._whole(linear.input_size, settings.dim, init)
            self.linear_out = ColumnParallelLinear(
                settings.dim, linear.output_size, init_method=torch.nn.init.zeros_, gather_output=False, **cut
            )
        else:
            self.linear_in = RowParallelLinear(
                linear.input_size, settings.dim, init_method=init, input_is_parallel=True, **cut
            )
            self.linear_out = self._whole(settings.dim, linear.output_size, torch.nn.init.zeros_)

    def _whole(self, inputs: int, outputs: int, init: Callable[[Tensor], Any]) -> torch.nn.Linear:
        made = torch.nn.Linear(inputs, outputs, bias=False, dtype=self.config.params_dtype)
        if self.config.perform_initialization:
            init(made.weight)
        weight: Any = made.weight
        weight.sequence_parallel = self.config.sequence_parallel
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(S, B, inputs) to (S', B, outputs), as the layer beside it cuts them."""
        with self._random_numbers():
            x = torch.nn.functional.dropout(x, self._dropout, self.training)
        hidden = _output(self.linear_in(x))
        return _output(self.linear_out(hidden)) * self._scale

    def _random_numbers(self) -> Any:
        """Tensor-parallel ranks with the same input drop the same elements; those with different ones, others."""
        if not self._dropout or not self.training:
            return nullcontext()
        differs = self.config.sequence_parallel or not self._cuts_outputs
        return get_cuda_rng_tracker().fork() if differs else nullcontext()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's, with the halves of a gated layer apart, as the layer has them."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self._is_gated:
            key = f"{prefix}linear_out.weight"
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


def add_adapters(model: Any, settings: LoraSettings) -> int:
    """Put an adapter beside every target of a built GPTModel's layers and freeze everything else.

    Returns:
        The number of adapters.

    Raises:
        UnsupportedError: a layer lacks a target, or builds it from other modules than Megatron's local ones.
    """
    model.requires_grad_(False)
    names = WeightNames(settings.seed)
    count = 0
    for layer in model.decoder.layers:
        for target in settings.targets:
            parent = getattr(layer, PARENTS[target])
            linear = getattr(parent, target, None)
            if linear is None:
                raise _no_target(parent, target)
            names.scope = f"lora {target} "
            with names.building_layer(layer.layer_number):
                is_gated = (
                    target == "linear_fc1" and isinstance(parent, MLP) and parent.config.gated_linear_unit
                )
                adapter = LoraAdapter(linear, settings, _init_of(names), is_gated=is_gated)
            parent.add_module(target + SUFFIX, adapter)
            linear.register_forward_hook(_AddAdapter(adapter))
            count += 1
    keep_graph(model)
    return count


def keep_graph(model: Any) -> None:
    """Let frozen embeddings have gradients, as activation recomputation has none to return if its inputs need none."""
    if model.pre_process:
        model.embedding.register_forward_hook(_require_gradient)


def is_adapter(name: str) -> bool:
    """Whether a name in a state dict is that of an adapter's weight."""
    return any(part.endswith(SUFFIX) for part in name.split("."))


class _AddAdapter:
    """A forward hook, which does not register the adapter a second time."""

    def __init__(self, adapter: LoraAdapter) -> None:
        self._adapter = adapter

    def __call__(
        self, linear: torch.nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        del linear
        return (output[0] + self._adapter(args[0]), *output[1:])


def _require_gradient(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
    del module, args
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()
    return output


def _init_of(names: WeightNames) -> Callable[[Tensor], Tensor]:
    def draw(weight: Tensor) -> Tensor:
        bound = 1 / math.sqrt(weight.shape[1])
        return names.uniform(weight, -bound, bound)

    return draw


def _output(found: Tensor | tuple[Tensor, Any]) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]


def _not_local(linear: torch.nn.Module) -> UnsupportedError:
    return UnsupportedError(
        explain(
            got=f"an adapter for a {type(linear).__name__}",
            rule="adapters are added to Megatron's local linear layers, whose input they see",
            remedy="Set the environment variable MLS_TRANSFORMER_IMPL=local",
        )
    )


def _no_target(parent: torch.nn.Module, target: str) -> UnsupportedError:
    return UnsupportedError(
        explain(
            got=f"lora_target_modules with {target}, which {type(parent).__name__} lacks",
            rule="every layer of the model has all targets",
            remedy=f"Remove {target} from lora_target_modules",
        )
    )
