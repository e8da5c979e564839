"""What Megatron does when: its own timers, and the forward passes of layers, as regions of a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from megatron_lightseq.attention.trace import Trace
from megatron_lightseq.training.setup import Training


class _Timer:
    """One of Megatron's timers, whose stretches are regions."""

    def __init__(self, trace: Trace, name: str) -> None:
        self._trace, self._name = trace, name

    def start(self, barrier: bool = False) -> None:
        """Begin a region. There is no barrier: it would change what is measured."""
        del barrier
        self._trace.enter(self._name)

    def stop(self, barrier: bool = False) -> None:
        """End the region."""
        del barrier
        self._trace.leave(self._name)


class TraceTimers:
    """In place of Megatron's ``Timers``, in the field ``timers`` of its configurations."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """The timer of a name, whatever its level."""
        del log_level
        return _Timer(self._trace, name)


def install(trace: Trace, training: Training) -> ExitStack:
    """Make ``training`` record into ``trace``; closing the result undoes it."""
    undo = ExitStack()
    _set(undo, training.attention_stats, "trace", trace)
    timers = TraceTimers(trace)
    for config in _configs(training):
        _set(undo, config, "timers", timers)
    for model in training.models:
        for name, module in _parts(model):
            undo.callback(module.register_forward_pre_hook(_entering(trace, name)).remove)
            undo.callback(module.register_forward_hook(_leaving(trace, name)).remove)
    return undo


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _configs(training: Training) -> list[Any]:
    """The configurations whose timers Megatron's schedules and optimizers use, each once."""
    found = [training.model_config, *(chunk.config for chunk in training.chunks)]
    optimizer = training.optimizer
    found += [each.config for each in getattr(optimizer, "chained_optimizers", [optimizer])]
    found += [optimizer.config] if hasattr(optimizer, "config") else []
    return list({id(config): config for config in found if hasattr(config, "timers")}.values())


def _parts(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules to show, with their names."""
    for name in ("embedding", "output_layer"):
        part = getattr(model, name, None)
        if isinstance(part, torch.nn.Module):
            yield name.replace("_", " "), part
    for module in model.modules():
        if not isinstance(module, BaseTransformerLayer):
            continue
        layer = f"layer {getattr(module, 'layer_number', '?')}"
        yield layer, module
        for part in ("self_attention", "mlp"):
            inner = getattr(module, part, None)
            if isinstance(inner, torch.nn.Module) and not isinstance(inner, IdentityOp):
                yield f"{layer} {part.removeprefix('self_')}", inner


def _entering(trace: Trace, name: str) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, _given: Any) -> None:
        trace.enter(name)

    return hook


def _leaving(trace: Trace, name: str) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, _given: Any, _result: Any) -> None:
        trace.leave(name)

    return hook
