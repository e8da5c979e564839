"""MLPs and losses computed in tiles of the local sequence, so that what lies inside them never exists whole.

Context parallelism cuts the sequence and leaves widths alone. At long sequences the widest tensors of a rank are then
no longer attention's: they are the logits (tokens x vocabulary, in fp32) and what lies inside the MLP (tokens x twice
the MLP's width, with a gate). Both belong to one token at a time, so they can be computed tile by tile: forward keeps
the input alone, and backward computes each tile once more, with a graph, and frees it before it comes to the next
(tiles over the sequence: Arctic Long Sequence Training, arXiv 2506.13996).

Values are those of the whole computation. Gradients of weights are sums over tiles, so they differ in the order of
summation: they are added up in fp32 (or fp64), where Megatron keeps them (``main_grad``) if it does.

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
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.megatron.checkpoint_scope import current_scope, track_checkpoints

Compute = Callable[[Tensor, slice], Tensor]
"""From some rows (t, ...) of a tensor, and which they are, to as many rows of the result."""
Forward = Callable[..., tuple[Any, Any]]
"""A layer's ``forward``: what it computes, and a bias that is still to be added, or None."""


def tiles(rows: int, tile_rows: int) -> Iterator[slice]:
    """All rows in order, ``tile_rows`` at a time."""
    return (slice(begin, min(begin + tile_rows, rows)) for begin in range(0, rows, tile_rows))


def in_tiles(compute: Compute, x: Tensor, parameters: Sequence[torch.nn.Parameter], tile_rows: int) -> Tensor:
    """``compute`` applied to ``x`` tile by tile, forward and backward.

    Args:
        compute: row by row: a row of its result depends on the same row of ``x`` and on ``parameters`` alone. Called
            once more in backward, and must do the same then.
        x: (S, ...).
        parameters: leaves that ``compute`` uses and that want gradients.
        tile_rows: rows of a tile; the last may have fewer.

    Returns:
        (S, ...), of the shape and dtype that ``compute`` returns for all rows.
    """
    result: Tensor = _InTiles.apply(compute, tile_rows, x, *parameters)
    return result


class _InTiles(torch.autograd.Function):
    """Parameters are arguments, so that autograd hands each its gradient once, whatever the number of tiles.

    Megatron's data parallelism counts on that: its hooks take a gradient for the last (distributed_data_parallel.py).
    """

    @staticmethod
    def forward(
        ctx: Any, compute: Compute, tile_rows: int, x: Tensor, *parameters: torch.nn.Parameter
    ) -> Tensor:
        ctx.compute, ctx.tile_rows, ctx.parameters = compute, tile_rows, parameters
        ctx.save_for_backward(x)
        result: Tensor | None = None
        for rows in tiles(len(x), tile_rows):
            part = compute(x[rows], rows)
            if result is None:
                result = part.new_empty((len(x), *part.shape[1:]))
            result[rows] = part
        assert result is not None, "there is a row"
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        for rows in tiles(len(x), ctx.tile_rows):
            grad_tile, *parts = _tile_gradients(ctx.compute, x[rows], rows, ctx.parameters, grad[rows])
            assert grad_tile is not None, "compute uses its rows"
            grad_x[rows] = grad_tile
            sums = [_add(*each) for each in zip(ctx.parameters, sums, parts, strict=True)]
        totals = [
            None if total is None else total.to(parameter.dtype)
            for parameter, total in zip(ctx.parameters, sums, strict=True)
        ]
        return None, None, grad_x, *totals


def _tile_gradients(
    compute: Compute, x: Tensor, rows: slice, parameters: Sequence[torch.nn.Parameter], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of a tile of ``x`` and of the parameters; the tile's graph ends with this call."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        part = compute(x, rows)
    return torch.autograd.grad(part, (x, *parameters), grad, allow_unused=True)


def _add(parameter: torch.nn.Parameter, total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """One more tile's gradient of a parameter; what is returned last goes to autograd.

    With Megatron's fp32 ``main_grad`` earlier tiles go there, and autograd brings the last: no second buffer of the
    weight's size is held. With ``gradient_accumulation_fusion`` the layer itself has added to ``main_grad`` and
    returns a placeholder.
    """
    if total is None or part is None or getattr(parameter, "grad_added_to_main_grad", False):
        return part if part is not None else total
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None and main_grad.dtype == torch.float32:
        main_grad.add_(total)
        return part
    return total.to(torch.promote_types(total.dtype, torch.float32)) + part


class TiledMLP:
    """The ``forward`` of one dense MLP of Megatron's, in tiles.

    Args:
        mlp: keeps its weights, its names in checkpoints, and its own ``forward`` for one tile.
        tile_tokens: tokens of a tile, over the micro-batch and, with sequence parallelism, over all R ranks.
        replays_value: whether somebody reads what the MLP returns when its layer is recomputed; see :func:`tile_mlps`.
    """

    def __init__(self, mlp: MLP, tile_tokens: int, *, replays_value: bool) -> None:
        self._mlp = mlp
        self._forward: Forward = mlp.forward
        self._tile_tokens = tile_tokens
        self._replays_value = replays_value

    def __call__(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's: (S, B, h) to (S, B, h), and a bias (h,) that the caller adds, or None."""
        config = self._mlp.config
        rows = _tile_rows(hidden_states, self._tile_tokens, config)
        if len(hidden_states) <= rows or per_token_scale is not None:
            return self._forward(hidden_states, per_token_scale, **options)
        bias = self._mlp.linear_fc2.bias if config.add_bias_linear else None
        scope = current_scope()
        skips = scope is not None and scope.replaying and not self._replays_value

        def compute(tile: Tensor, where: slice) -> Tensor:
            del where
            if skips and not torch.is_grad_enabled():
                return torch.full_like(
                    tile, math.nan
                )  # nobody reads it; if somebody did, the loss would say so
            out: Tensor = self._forward(tile, **options)[0]
            return out

        return in_tiles(compute, hidden_states, _trained(self._mlp), rows), bias


def tile_mlps(model: torch.nn.Module, tile_tokens: int, *, replays_value: bool = True) -> int:
    """Have the MLP of every transformer layer below ``model`` computed in tiles, forward and backward.

    Args:
        model: a finished GPTModel, or any module with Megatron's TransformerLayers.
        tile_tokens: tokens whose intermediate results are held at a time; a sequence that is no longer is computed
            as before.
        replays_value: False says that with activation recomputation each checkpoint holds one layer, of which an
            MLP's result is only added to the residual and returned. Then recomputation, which wants the layer's
            graph and not its value, leaves the MLP's value out, and the backward of tiles recomputes nothing twice.

    Returns:
        How many MLPs there were.

    Raises:
        UnsupportedError: a layer has something other than a dense MLP, such as experts.
    """
    track_checkpoints()
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    for layer in layers:
        if type(layer.mlp) is not MLP:
            raise UnsupportedError(
                explain(
                    got=f"a layer with {type(layer.mlp).__name__} in the place of its MLP",
                    rule="tiles are of dense MLPs, which compute one token at a time",
                    remedy="Remove mlp_tile_tokens",
                )
            )
        layer.mlp.forward = TiledMLP(layer.mlp, tile_tokens, replays_value=replays_value)
    return len(layers)


@dataclass(frozen=True, slots=True)
class PendingLogits:
    """What the output layer returns until labels come: its product is computed with them, tile by tile."""

    project: Callable[[Tensor], Tensor]
    """From hidden states (t, B, h) to logits (R * t, B, vocabulary / tensor-parallel ranks)."""
    hidden: Tensor
    """(S, B, h)."""
    parameters: tuple[torch.nn.Parameter, ...]

    def transpose(self, first: int, second: int) -> Tensor:
        """All logits after all: Megatron's model transposes them where it is given no labels."""
        return self.project(self.hidden).transpose(first, second)


class TiledLoss:
    """The output layer and the cross entropy of one GPTModel, in tiles; both stay Megatron's for one tile.

    Put into the model by :func:`tile_loss`. Multi-token prediction, which takes its losses by the same two calls,
    gets tiles as well.
    """

    def __init__(self, model: Any, tile_tokens: int) -> None:
        self._config = model.config
        self._layer = model.output_layer
        self._project: Forward = model.output_layer.forward
        self._cross_entropy: Callable[[Tensor, Any], Tensor] = model.compute_language_model_loss
        self._tile_tokens = tile_tokens

    def defer(
        self, hidden: Tensor, weight: torch.nn.Parameter | None = None, **options: Any
    ) -> tuple[PendingLogits, None]:
        """In the place of the output layer's ``forward``: hidden states (S, B, h) and a shared weight, or None."""

        def project(tile: Tensor) -> Tensor:
            logits: Tensor = self._project(tile, weight=weight, **options)[0]
            return logits

        candidates = (self._layer.weight if weight is None else weight, getattr(self._layer, "bias", None))
        trained = tuple(each for each in candidates if each is not None and each.requires_grad)
        return PendingLogits(project, hidden, trained), None

    def losses(self, labels: Tensor, logits: PendingLogits | Tensor) -> Tensor:
        """In the place of ``compute_language_model_loss``: labels (B, R * S) to losses (B, R * S), fp32."""
        if isinstance(logits, Tensor):
            return self._cross_entropy(labels, logits)
        hidden = logits.hidden
        rows = _tile_rows(hidden, self._tile_tokens, self._config)
        if len(hidden) <= rows:
            return self._cross_entropy(labels, logits.project(hidden))
        # Ranks whose tokens meet hold one part of the sequence each: a tile has some tokens out of every part.
        batch, length = labels.shape
        labels_BRS = labels.view(batch, length // len(hidden), len(hidden))

        def compute(tile: Tensor, where: slice) -> Tensor:
            of_tile = labels_BRS[:, :, where]
            losses = self._cross_entropy(of_tile.reshape(batch, -1), logits.project(tile))
            return losses.view(of_tile.shape).permute(2, 0, 1)

        losses_SBR = in_tiles(compute, hidden, logits.parameters, rows)
        return losses_SBR.permute(1, 2, 0).reshape(batch, length)


def tile_loss(model: Any, tile_tokens: int) -> None:
    """Have a GPTModel compute its logits and losses in tiles, forward and backward.

    Without labels it returns logits, as before.

    Args:
        model: the last pipeline stage's, finished.
        tile_tokens: tokens whose logits are held at a time; a sequence that is no longer is computed as before.
    """
    assert model.post_process, "only the last pipeline stage has an output layer"
    tiled = TiledLoss(model, tile_tokens)
    model.output_layer.forward = tiled.defer
    model.compute_language_model_loss = tiled.losses


def compute_in_tiles(
    model: Any, mlp_tokens: int | None, loss_tokens: int | None, *, replays_value: bool = True
) -> None:
    """:func:`tile_mlps` and :func:`tile_loss` of a finished GPTModel, where a number of tokens is given.

    Raises:
        UnsupportedError: a layer has no dense MLP.
    """
    if mlp_tokens is not None:
        tile_mlps(model, mlp_tokens, replays_value=replays_value)
    if loss_tokens is not None and model.post_process:
        tile_loss(model, loss_tokens)


def _trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _tile_rows(hidden: Tensor, tile_tokens: int, config: Any) -> int:
    """Local rows (S) of a tile: its tokens are those of the micro-batch on all ranks that meet in a product."""
    ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return max(1, tile_tokens // (hidden.shape[1] * ranks))
