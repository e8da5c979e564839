"""Linear attention in plain torch, on any device: matrix products over blocks of 64 tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lightseq.kernels.linear.blocks import (
    KeySide,
    Prepared,
    QuerySide,
    blocks_of,
    tokens_of,
)
from megatron_lightseq.kernels.linear.contract import Gradients, Part, StateMap, act, apply
from megatron_lightseq.kernels.linear.specs import LINEAR_KERNELS
from megatron_lightseq.kernels.registry import accumulator_dtype

_Solved = tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True)
class _Inner:
    """What a block needs besides a state."""

    out: Tensor
    """(m, n, B, H, C, V): the output for a state of zero."""
    queries: Tensor
    """(m, n, B, H, C, K): what a state is multiplied by."""
    maps: StateMap
    """What each block does to a state, with m before the dimensions of a map of pieces."""


class TorchLinearKernel:
    """Matrix products over blocks; any dtype of floating-point numbers and any head dims."""

    spec = LINEAR_KERNELS["torch"]
    name = spec.name
    longest_part = 1024

    def unsupported(self, part: Part) -> str | None:
        """Why this machine cannot run the kernel: it can."""
        return None

    def summarise(self, part: Part) -> tuple[StateMap, _Solved]:
        """As in :class:`~.contract.LinearKernel`; keeps the triangular solutions of the delta rule."""
        side = Prepared(part).key_side()
        solved = None if side.erase is None else (side.values, side.erase)
        return _joined(_block_maps(side)), solved

    def inner(self, part: Part, kept: _Solved) -> _Inner:
        """As in :class:`~.contract.LinearKernel`."""
        prepared = Prepared(part, kept)
        side, rows = prepared.key_side(), prepared.query_side()
        return _Inner(rows.scores @ side.values, _effective(rows, side), _block_maps(side))

    def outer(self, part: Part, inner: _Inner, states: Tensor, out: Tensor) -> None:
        """As in :class:`~.contract.LinearKernel`."""
        entering = _entering(inner.maps, states)
        out.copy_(tokens_of(inner.out + inner.queries @ entering, part.piece))

    def summarise_backward(self, part: Part, dout: Tensor) -> tuple[Tensor, _Taped]:
        """As in :class:`~.contract.LinearKernel`; keeps the blocks as autograd recorded them."""
        taped = _Taped.of(part, dout)
        return _behind(taped.maps, taped.direct, torch.zeros_like(taped.direct[0]))[0], taped

    def backward(
        self,
        part: Part,
        dout: Tensor,
        states: Tensor,
        behind: Tensor,
        kept: _Taped | None,
        gradients: Gradients,
    ) -> None:
        """As in :class:`~.contract.LinearKernel`; through the blocks by autograd."""
        taped = _Taped.of(part, dout) if kept is None else kept
        with torch.no_grad():
            _, each = _behind(taped.maps, taped.direct, behind)
            pairs = _block_gradients(
                taped.side, taped.rows, _entering(taped.maps, states), each, taped.dblocks
            )
        pairs = [(x, grad) for x, grad in pairs if x.requires_grad]
        wanted = [x for x in taped.leaves if x is not None]
        found = torch.autograd.grad(
            [x for x, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True
        )
        for to, grad in zip((x for x in gradients if x is not None), found, strict=True):
            to.zero_() if grad is None else to.copy_(grad)


@dataclass(frozen=True, slots=True)
class _Taped:
    """The blocks of a part, recorded by autograd, and what its outputs give to the states that enter them."""

    leaves: list[Tensor | None]
    side: KeySide
    rows: QuerySide
    dblocks: Tensor
    """(m, n, B, H, C, V): the gradient of the output."""
    maps: StateMap
    direct: Tensor
    """(m, n, B, H, K, V): what the outputs of a block give to the state that enters it."""

    @staticmethod
    def of(part: Part, dout: Tensor) -> _Taped:
        leaves = [None if x is None else x.detach().requires_grad_() for x in part.tensors]
        with torch.enable_grad():
            prepared = Prepared(part.with_tensors(leaves))
            side, rows = prepared.key_side(), prepared.query_side()
        with torch.no_grad():
            dblocks = _gradient_blocks(dout, part)
            direct = _effective(rows, side).mT @ dblocks
            return _Taped(leaves, side, rows, dblocks, _block_maps(side), direct)


def _gradient_blocks(dout: Tensor, part: Part) -> Tensor:
    return blocks_of(dout.to(accumulator_dtype(part.v.dtype)), part.piece)


def _effective(rows: QuerySide, side: KeySide) -> Tensor:
    """What a block's entering state is multiplied by, on its own way and through what the delta rule erases."""
    return rows.queries if side.erase is None else rows.queries - rows.scores @ side.erase


def _block_maps(side: KeySide) -> StateMap:
    """(m, n, ...): what each block does to a state."""
    write = side.keys.mT @ side.values
    if side.erase is None:
        return StateMap(side.keep, write)
    kept = torch.diag_embed(side.keep.expand(*side.keep.shape[:4], write.shape[-2], 1)[..., 0])
    return StateMap(kept - side.keys.mT @ side.erase, write)


def _joined(maps: StateMap) -> StateMap:
    """The maps (n, ...) of whole pieces, from those of their blocks."""
    transition, write = maps.transition[0], maps.write[0]
    for then, adds in zip(maps.transition[1:], maps.write[1:], strict=True):
        transition, write = apply(then, transition), act(then, write, adds)
    return StateMap(transition, write)


def _entering(maps: StateMap, states: Tensor) -> Tensor:
    """(m, n, B, H, K, V): the state that enters each block, from those that enter the pieces."""
    entering = [states]
    for then, adds in zip(maps.transition[:-1], maps.write[:-1], strict=True):
        entering.append(act(then, entering[-1], adds))
    return torch.stack(entering)


def _behind(maps: StateMap, direct: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states that enter the pieces, and of those behind every block.

    Args:
        maps: of the blocks.
        direct: (m, n, B, H, K, V), what the outputs of a block give to the state that enters it.
        gradient: (n, B, H, K, V), of the states behind the pieces.
    """
    behind = []
    for then, gives in zip(maps.transition.flip(0), direct.flip(0), strict=True):
        behind.append(gradient)
        gradient = act(then, gradient, gives, transposed=True)
    return gradient, torch.stack(behind[::-1])


def _block_gradients(
    side: KeySide, rows: QuerySide, states: Tensor, behind: Tensor, dout: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Every tensor of the blocks with its gradient; states and their gradients are those of each block."""
    written = side.values if side.erase is None else side.values - side.erase @ states
    dwritten = rows.scores.mT @ dout + side.keys @ behind
    through = states * behind
    dkeep = through.sum((-1, -2), keepdim=True)
    if side.keep.shape[-2] > 1:
        dkeep = through.sum(-1, keepdim=True)
    pairs = [
        (rows.queries, dout @ states.mT),
        (rows.scores, dout @ written.mT),
        (side.values, dwritten),
        (side.keys, written @ behind.mT),
        (side.keep, dkeep),
    ]
    if side.erase is not None:
        pairs.append((side.erase, -(dwritten @ states.mT)))
    return pairs
