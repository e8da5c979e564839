"""The output layer's logits: bounded by a softcap, and without the rows that only pad the vocabulary.

Shape letters: S = local tokens, B = batch, V = rows of the output layer on this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FinishedLogits:
    """The ``forward`` of one GPTModel's output layer, with a softcap, and with -inf where there is no token.

    Args:
        layer: Megatron's output layer; its own ``forward`` computes the products.
        vocab_size: tokens; the rows beyond only pad the weights to a size that divides.
        rows: of the output layer, over all tensor-parallel ranks.
        rank: this tensor-parallel rank.
        softcap: c in c * tanh(logit / c); None: logits as they are.
    """

    def __init__(
        self, layer: torch.nn.Module, *, vocab_size: int, rows: int, rank: int, softcap: float | None
    ) -> None:
        self._forward: Callable[..., tuple[Tensor, Any]] = layer.forward
        self._vocab_size, self._rows, self._rank, self._softcap = vocab_size, rows, rank, softcap

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """As Megatron's: hidden states to (logits (S, B, V), bias or None)."""
        logits, bias = self._forward(*args, **kwargs)
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        width = logits.shape[-1]
        first = 0 if width == self._rows else self._rank * width  # all of them, if they were gathered
        if first + width > self._vocab_size:
            # In place and unseen by autograd: the gradient of a logit of -inf is 0 in every loss, since its
            # probability is, and a copy of all logits would be the largest tensor of the step.
            logits.detach()[..., max(0, self._vocab_size - first) :].fill_(float("-inf"))
        return logits, bias


def finish_logits(model: Any, vocab_size: int, softcap: float | None) -> None:
    """Keep padded rows of the vocabulary out of the softmax of a GPTModel, and bound its logits.

    Multi-token prediction uses the same output layer, and gets the same logits. Call it before
    :func:`~megatron_lightseq.megatron.slice_loss`.

    Args:
        model: the built model of the last pipeline stage.
        vocab_size: without padding.
        softcap: see :class:`FinishedLogits`.
    """
    if vocab_size == model.vocab_size and softcap is None:
        return
    model.output_layer.forward = FinishedLogits(
        model.output_layer,
        vocab_size=vocab_size,
        rows=model.vocab_size,
        rank=model.pg_collection.tp.rank(),
        softcap=softcap,
    )
