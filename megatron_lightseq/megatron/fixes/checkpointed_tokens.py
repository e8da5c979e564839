"""Layers of multi-token prediction that can be recomputed, in releases of Megatron-Core where they cannot."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

from megatron_lightseq.errors import UnsupportedError, explain


def checkpoint_multi_token_layers(model: torch.nn.Module) -> int:
    """Mend ``_checkpointed_forward`` of every layer of multi-token prediction below ``model``.

    A second call does nothing.

    * Up to 0.16 it hands all arguments to a checkpoint, which saves them as tensors: objects such as
      ``packed_seq_params`` are kept out.
    * In 0.18.0 the layer gives it a ``padding_mask``, which it does not take: none is left out.

    Returns:
        The number of layers that were changed.
    """
    changed = 0
    for module in model.modules():
        if not isinstance(module, MultiTokenPredictionLayer) or "_checkpointed_forward" in vars(module):
            continue
        layer: Any = module
        taken = inspect.signature(layer._checkpointed_forward).parameters
        if "forward_func" in taken:
            layer._checkpointed_forward = _with_tensors_only(layer._checkpointed_forward)
        elif "padding_mask" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            layer._checkpointed_forward = _without_padding_mask(layer._checkpointed_forward)
        else:
            continue
        changed += 1
    return changed


def _with_tensors_only(original: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(forward_func: Callable[..., Any], *args: Any, **options: Any) -> Any:
        saved = {
            name: value for name, value in options.items() if value is None or isinstance(value, torch.Tensor)
        }
        objects = {name: value for name, value in options.items() if name not in saved}

        def forward(*values: Any) -> Any:
            given, named = values[: len(args)], values[len(args) :]
            return forward_func(*given, **dict(zip(saved, named, strict=True)), **objects)

        return original(forward, *args, **saved)

    return checkpointed


def _without_padding_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(*args: Any, padding_mask: torch.Tensor | None = None, **options: Any) -> Any:
        if padding_mask is not None:
            raise UnsupportedError(
                explain(
                    got="a padding_mask for a layer of multi-token prediction that is recomputed",
                    rule="this release of Megatron-Core cannot checkpoint it",
                    remedy="Leave the padding_mask out, or recompute selectively",
                )
            )
        return original(*args, **options)

    return checkpointed
