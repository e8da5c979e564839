"""MLPs and losses computed in slices of the local sequence, so that their activations never exist for all tokens.

Context parallelism splits the sequence, but not the widths. At long sequences the largest tensors of a rank are then no
longer attention's: they are the logits (tokens x vocabulary, in fp32) and the activations of the MLP (tokens x twice
the MLP's width, with a gate). Both are computed for each token separately, so they can be computed slice by slice:
forward keeps only the input, and backward recomputes one slice at a time, with a graph that is freed before the next
slice (Arctic Long Sequence Training, arXiv 2506.13996, calls this tiling of the sequence).

Results are those of the whole computation. Gradients of weights are sums over slices, so they differ in the order of
summation: they are accumulated in fp32 (or fp64), in Megatron's ``main_grad`` if there is one.

Shapes, per rank: S local tokens (with sequence parallelism those of this tensor-parallel rank), B micro-batch,
h hidden size, R ranks whose tokens meet in one matrix product: the tensor-parallel ones with sequence parallelism,
else 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.megatron.checkpoint_scope import current_scope, track_checkpoints

Compute = Callable[[Tensor, slice], Tensor]
"""From some rows (s, ...) of a tensor, and their range, to as many rows of the result."""
Forward = Callable[..., tuple[Any, Any]]
"""A layer's ``forward``: its output, and a bias that is still to be added, or None."""


def slices(num_rows: int, slice_rows: int) -> Iterator[slice]:
    """All rows in order, ``slice_rows`` at a time."""
    return (slice(begin, min(begin + slice_rows, num_rows)) for begin in range(0, num_rows, slice_rows))


def in_slices(
    compute: Compute, x: Tensor, parameters: Sequence[torch.nn.Parameter], slice_rows: int
) -> Tensor:
    """``compute`` applied to ``x`` slice by slice, forward and backward.

    Args:
        compute: row by row: a row of its result depends only on the same row of ``x`` and on ``parameters``. It is
            called once more in backward, and must compute the same then.
        x: (S, ...).
        parameters: leaves that ``compute`` uses and that need gradients.
        slice_rows: rows per slice; the last slice may have fewer.

    Returns:
        (S, ...), of the shape and dtype that ``compute`` returns for all rows.
    """
    result: Tensor = _InSlices.apply(compute, slice_rows, x, *parameters)
    return result


class _InSlices(torch.autograd.Function):
    """Parameters are arguments, so that autograd delivers each gradient once, whatever the number of slices.

    Megatron's data parallelism relies on it: its hooks treat the first gradient of a parameter as the complete one
    (distributed_data_parallel.py).
    """

    @staticmethod
    def forward(
        ctx: Any, compute: Compute, slice_rows: int, x: Tensor, *parameters: torch.nn.Parameter
    ) -> Tensor:
        ctx.compute, ctx.slice_rows, ctx.parameters = compute, slice_rows, parameters
        ctx.save_for_backward(x)
        result: Tensor | None = None
        for rows in slices(len(x), slice_rows):
            part = compute(x[rows], rows)
            if result is None:
                result = part.new_empty((len(x), *part.shape[1:]))
            result[rows] = part
        assert result is not None, "x has a row"
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        for rows in slices(len(x), ctx.slice_rows):
            grad_rows, *parts = _slice_gradients(ctx.compute, x[rows], rows, ctx.parameters, grad[rows])
            assert grad_rows is not None, "compute uses its rows"
            grad_x[rows] = grad_rows
            sums = [_add(*each) for each in zip(ctx.parameters, sums, parts, strict=True)]
        totals = [
            None if total is None else total.to(parameter.dtype)
            for parameter, total in zip(ctx.parameters, sums, strict=True)
        ]
        return None, None, grad_x, *totals


def _slice_gradients(
    compute: Compute, x: Tensor, rows: slice, parameters: Sequence[torch.nn.Parameter], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of one slice of ``x`` and of the parameters; the graph of the slice is freed on return."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        part = compute(x, rows)
    return torch.autograd.grad(part, (x, *parameters), grad, allow_unused=True)


def _add(parameter: torch.nn.Parameter, total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Add one more slice's gradient of a parameter; the last result goes to autograd.

    With Megatron's fp32 ``main_grad``, earlier slices are added there and autograd delivers the last one, so that no
    second buffer of the weight's size is needed. With ``gradient_accumulation_fusion`` the layer itself has added to
    ``main_grad`` and returns a placeholder.
    """
    if total is None or part is None or getattr(parameter, "grad_added_to_main_grad", False):
        return part if part is not None else total
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None and main_grad.dtype == torch.float32:
        main_grad.add_(total)
        return part
    return total.to(torch.promote_types(total.dtype, torch.float32)) + part


class SlicedMLP:
    """The ``forward`` of one of Megatron's dense MLPs, in slices.

    Args:
        mlp: keeps its weights, their names in checkpoints, and its own ``forward``, which computes one slice.
        slice_tokens: tokens per slice, over the micro-batch and, with sequence parallelism, over all R ranks.
        replays_value: whether the MLP's result is used when its layer is recomputed; see :func:`slice_mlps`.
    """

    def __init__(self, mlp: MLP, slice_tokens: int, *, replays_value: bool) -> None:
        self._mlp = mlp
        self._forward: Forward = mlp.forward
        self._slice_tokens = slice_tokens
        self._replays_value = replays_value

    def __call__(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Like Megatron's: (S, B, h) to (S, B, h), and a bias (h,) that the caller adds, or None."""
        config = self._mlp.config
        slice_rows = _slice_rows(hidden_states, self._slice_tokens, config)
        if len(hidden_states) <= slice_rows or per_token_scale is not None:
            return self._forward(hidden_states, per_token_scale, **options)
        bias = self._mlp.linear_fc2.bias if config.add_bias_linear else None
        scope = current_scope()
        skips = scope is not None and scope.replaying and not self._replays_value

        def compute(x: Tensor, rows: slice) -> Tensor:
            del rows
            if skips and not torch.is_grad_enabled():
                return torch.full_like(x, math.nan)  # never used; if it were, the loss would be NaN
            out: Tensor = self._forward(x, **options)[0]
            return out

        return in_slices(compute, hidden_states, _trained(self._mlp), slice_rows), bias


def slice_mlps(model: torch.nn.Module, slice_tokens: int, *, replays_value: bool = True) -> int:
    """Compute the MLP of every transformer layer below ``model`` in slices, forward and backward.

    Args:
        model: a built GPTModel, or any module with Megatron's TransformerLayers.
        slice_tokens: tokens whose activations are held at a time; sequences that are not longer are not sliced.
        replays_value: False promises that with activation recomputation each checkpoint holds one layer, so that an
            MLP's result is only added to the residual and returned. Recomputation then needs the layer's graph but not
            the MLP's value, which is left out, and the backward of slices recomputes nothing twice.

    Returns:
        The number of MLPs.

    Raises:
        UnsupportedError: a layer has something other than a dense MLP, such as experts.
    """
    track_checkpoints()
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for layer in layers:
        if type(layer.mlp) is not MLP:
            raise UnsupportedError(
                explain(
                    got=f"a layer with {type(layer.mlp).__name__} instead of a dense MLP",
                    rule="only dense MLPs, which compute each token separately, are computed in slices",
                    remedy="Leave mlp_tile_tokens out",
                )
            )
        layer.mlp.forward = SlicedMLP(layer.mlp, slice_tokens, replays_value=replays_value)
    return len(layers)


@dataclass(frozen=True, slots=True)
class PendingLogits:
    """What the output layer returns until labels are known: its product is computed slice by slice with them."""

    project: Callable[[Tensor], Tensor]
    """From hidden states (s, B, h) to logits (R * s, B, vocabulary / tensor-parallel ranks)."""
    hidden: Tensor
    """(S, B, h)."""
    parameters: tuple[torch.nn.Parameter, ...]

    def transpose(self, first: int, second: int) -> Tensor:
        """All logits, transposed: Megatron's model asks for them if it is given no labels."""
        return self.project(self.hidden).transpose(first, second)


class SlicedLoss:
    """The output layer and the cross entropy of one GPTModel, in slices; Megatron computes one slice.

    :func:`slice_loss` puts it into the model. Multi-token prediction computes its losses through the same two methods,
    and gets slices as well.
    """

    def __init__(self, model: Any, slice_tokens: int) -> None:
        self._config = model.config
        self._layer = model.output_layer
        self._project: Forward = model.output_layer.forward
        self._cross_entropy: Callable[[Tensor, Any], Tensor] = model.compute_language_model_loss
        self._slice_tokens = slice_tokens

    def defer(
        self, hidden: Tensor, weight: torch.nn.Parameter | None = None, **options: Any
    ) -> tuple[PendingLogits, None]:
        """Replaces the output layer's ``forward``: hidden states (S, B, h) and a shared weight, or None."""

        def project(x: Tensor) -> Tensor:
            logits: Tensor = self._project(x, weight=weight, **options)[0]
            return logits

        candidates = (self._layer.weight if weight is None else weight, getattr(self._layer, "bias", None))
        trained = tuple(each for each in candidates if each is not None and each.requires_grad)
        return PendingLogits(project, hidden, trained), None

    def losses(self, labels: Tensor, logits: PendingLogits | Tensor) -> Tensor:
        """Replaces ``compute_language_model_loss``: labels (B, R * S) to losses (B, R * S), fp32."""
        if isinstance(logits, Tensor):
            return self._cross_entropy(labels, logits)
        hidden = logits.hidden
        slice_rows = _slice_rows(hidden, self._slice_tokens, self._config)
        if len(hidden) <= slice_rows:
            return self._cross_entropy(labels, logits.project(hidden))
        # Each of the R ranks holds one part of the sequence: a slice takes the same rows of every part.
        batch, length = labels.shape
        labels_BRS = labels.view(batch, length // len(hidden), len(hidden))

        def compute(x: Tensor, rows: slice) -> Tensor:
            labels_BRs = labels_BRS[:, :, rows]
            losses = self._cross_entropy(labels_BRs.reshape(batch, -1), logits.project(x))
            return losses.view(labels_BRs.shape).permute(2, 0, 1)

        losses_SBR = in_slices(compute, hidden, logits.parameters, slice_rows)
        return losses_SBR.permute(1, 2, 0).reshape(batch, length)


def slice_loss(model: Any, slice_tokens: int) -> None:
    """Make a GPTModel compute its logits and losses in slices, forward and backward.

    Without labels it returns logits, as before.

    Args:
        model: the built model of the last pipeline stage.
        slice_tokens: tokens whose logits are held at a time; sequences that are not longer are not sliced.
    """
    assert model.post_process, "only the last pipeline stage has an output layer"
    sliced = SlicedLoss(model, slice_tokens)
    model.output_layer.forward = sliced.defer
    model.compute_language_model_loss = sliced.losses
    _count_no_pending_predictions()


def _count_no_pending_predictions() -> None:
    """From 0.19 on, Megatron counts correct predictions of further tokens, for its log, from whole logits.

    Of logits that are computed in slices it counts none: they would have to be computed once more.
    """
    original = getattr(multi_token_prediction, "_compute_mtp_acceptance_counts", None)
    if original is None or isinstance(original, _Counts):
        return
    multi_token_prediction._compute_mtp_acceptance_counts = _Counts(original)


@dataclass(frozen=True, slots=True)
class _Counts:
    """Megatron's count of correct and of all predictions."""

    original: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, logits: Tensor | PendingLogits, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if isinstance(logits, PendingLogits):
            none = torch.zeros((), device=logits.hidden.device)
            return none, none.clone()
        return self.original(logits, *args, **kwargs)


def compute_in_slices(
    model: Any, mlp_tokens: int | None, loss_tokens: int | None, *, replays_value: bool = True
) -> None:
    """:func:`slice_mlps` and :func:`slice_loss` for a built GPTModel, each if its number of tokens is given.

    Raises:
        UnsupportedError: a layer has no dense MLP.
    """
    if mlp_tokens is not None:
        slice_mlps(model, mlp_tokens, replays_value=replays_value)
    if loss_tokens is not None and model.post_process:
        slice_loss(model, loss_tokens)


def _trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _slice_rows(hidden: Tensor, slice_tokens: int, config: Any) -> int:
    """Local rows (S) of a slice, whose tokens are those of the micro-batch on all R ranks."""
    ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return max(1, slice_tokens // (hidden.shape[1] * ranks))
