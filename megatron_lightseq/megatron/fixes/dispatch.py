"""Token dispatchers that let go of a micro-batch after they have combined its tokens.

Megatron's dispatchers keep the routing probabilities of the last micro-batch, and with them its whole autograd graph.
That graph ends in hooks of Megatron's DistributedDataParallel, which refer to the model, which holds the dispatchers.
Part of this cycle is in C++, where Python's garbage collector does not see it: a model with experts, its gradient
buffers and its process groups would stay until the process ends.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer


def release_dispatched_tokens(model: torch.nn.Module) -> int:
    """Make every token dispatcher below ``model`` drop its tensors with gradients when a layer's output is complete.

    A second call does nothing.

    Returns:
        The number of dispatchers that were changed.
    """
    dispatchers = [
        module.token_dispatcher
        for module in model.modules()
        if isinstance(module, MoELayer) and "combine_postprocess" not in vars(module.token_dispatcher)
    ]
    for dispatcher in dispatchers:
        # The last of its methods that a layer calls, also when a layer is recomputed.
        dispatcher.combine_postprocess = partial(_combine_and_release, dispatcher)
    return len(dispatchers)


def _combine_and_release(dispatcher: Any, *args: Any, **kwargs: Any) -> Any:
    combined = type(dispatcher).combine_postprocess(dispatcher, *args, **kwargs)
    for name, value in list(vars(dispatcher).items()):
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            setattr(dispatcher, name, None)
    return combined
