"""A short causal convolution over a cut sequence: the last tokens of a shard go to the next rank.

Shapes: S = local tokens, B = batch, C = channels, W = width of the convolution.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lightseq.attention.agreement import Agreement
from megatron_lightseq.attention.autograd import without_autocast
from megatron_lightseq.attention.inputs import MaskArgument, Masks, check_kind, masks_of
from megatron_lightseq.attention.planner import shortened, shown
from megatron_lightseq.errors import ConfigError, LayoutError, explain
from megatron_lightseq.kernels.registry import accumulator_dtype
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.linear.inputs import contiguous_layout
from megatron_lightseq.linear.visible import packings_of
from megatron_lightseq.mask import Mask
from megatron_lightseq.transport import Message, Transport, connect
from megatron_lightseq.transport.group import Group, rank_in, size_of

ACTIVATIONS = ("silu", "swish")
"""Names of what may follow the convolution: both are x * sigmoid(x)."""


def dist_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group | None = None,
    layout: str | SequenceLayout = "contiguous",
    mask: MaskArgument | None = None,
    activation: str | None = None,
) -> Tensor:
    """A depthwise causal convolution over a sequence that is cut over the ranks of ``group``.

    The output of a token is ``sum_j weight[:, W - 1 - j] * x[t - j]`` over its own document: the convolution of Mamba
    and of gated DeltaNet. W - 1 tokens travel to the next rank, and as many gradients back. Collective: as for
    :func:`megatron_lightseq.dist_attention`. Output and the gradient of x are the same bits for every number of ranks.

    Args:
        x: (S, B, C), this rank's tokens; any floating-point dtype.
        weight: (C, W), or (C, 1, W) as of ``torch.nn.Conv1d(C, C, W, groups=C)``.
        bias: (C,), or None.
        group: torch ProcessGroup of the context-parallel ranks; None for one rank.
        layout: how the shards were cut: contiguous, by name or as a SequenceLayout.
        mask: causal (the default), or causal documents, padded or not; or one mask for each row of the batch.
        activation: ``silu`` (or ``swish``) of the result; None for none.

    Returns:
        (S, B, C), x's dtype, computed in fp32, or in fp64 for fp64 inputs; differentiable in x, weight and bias. The
        gradients of weight and bias are those of the local outputs, to be summed over the ranks.

    Raises:
        ConfigError: shapes or devices do not fit together, or an unknown activation.
        LayoutError: the layout is not for this group, or a shard is shorter than W - 1 tokens.
        UnsupportedError: a mask other than causal documents, or a layout that is not contiguous.
        TransportError: the ranks disagree, or a peer was lost or did not make the same calls.
    """
    check_kind("x", x)
    kernel = weight.squeeze(1) if weight.dim() == 3 else weight
    _check(x, kernel, bias, activation)
    size = size_of(group)
    contiguous = contiguous_layout(layout, size)
    if size > 1 and x.shape[0] < kernel.shape[1] - 1:
        raise LayoutError(
            explain(
                got=f"{x.shape[0]} tokens on each of {size} ranks for a convolution over {kernel.shape[1]}",
                rule="a convolution looks back into one other rank at most",
                remedy=f"Give every rank at least {kernel.shape[1] - 1} tokens, or use fewer ranks",
            )
        )
    halo = _halo(
        x, kernel.shape[1], contiguous, masks_of(Mask.causal() if mask is None else mask, x.shape[1]), group
    )
    out: Tensor = _Convolution.apply(x, kernel, bias, halo)
    return out if activation is None else _silu(out)


def _silu(x: Tensor) -> Tensor:
    """``silu`` with the same bits wherever in the tensor a number is.

    On CPUs, torch rounds the last numbers of a tensor, those that fill no vector, in another way.
    """
    missing = -x.numel() % _VECTOR
    return F.silu(F.pad(x.flatten(), (0, missing)))[: x.numel()].view(x.shape)


_VECTOR = 64
"""A multiple of the numbers that torch's loops take at once."""


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    shapes_fit = x.dim() == 3 and weight.dim() == 2 and weight.shape[0] == x.shape[2] and weight.shape[1] > 0
    if not shapes_fit or (bias is not None and bias.shape != x.shape[2:]) or 0 in x.shape:
        given = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise ConfigError(
            explain(
                got=given + ("" if bias is None else f", bias {tuple(bias.shape)}"),
                rule="a depthwise convolution has a row of weights, and maybe a bias, for each channel of x",
                remedy="Give x (S, B, C), weight (C, W) or (C, 1, W), and bias (C,)",
            )
        )
    tensors = [t for t in (x, weight, bias) if t is not None]
    if any(not t.is_floating_point() or t.device != x.device for t in tensors):
        raise ConfigError(
            explain(
                got=", ".join(f"{t.dtype} on {t.device}" for t in tensors),
                rule="x, weight and bias are floating-point numbers on one device",
                remedy="Move and cast them first",
            )
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ConfigError(
            explain(
                got=f"activation {activation!r}",
                rule=f"what may follow the convolution is {' or '.join(ACTIVATIONS)}",
                remedy="Leave it out, and apply another activation to the result",
            )
        )


@dataclass(frozen=True, slots=True)
class _Halo:
    """Where the tokens before a shard, and the gradients behind it, come from."""

    rank: int
    size: int
    tokens: int
    """W - 1."""
    transport: Transport | None
    documents: Tensor | None
    """(R, W - 1 + S + W - 1): the document of each token, with those before and behind the shard."""

    def before(self, x: Tensor) -> Tensor:
        """The last tokens of the rank before; zeros on the first rank."""
        return self._neighbour(x[-self.tokens :], self.rank - 1, self.rank + 1, "the tokens before a shard")

    def behind(self, x: Tensor) -> Tensor:
        """The first tokens of the rank behind; zeros on the last rank."""
        return self._neighbour(x[: self.tokens], self.rank + 1, self.rank - 1, "gradients behind a shard")

    def _neighbour(self, mine: Tensor, source: int, target: int, what: str) -> Tensor:
        halo = mine.new_zeros(self.tokens, *mine.shape[1:])
        if self.transport is not None and self.tokens:
            sends = [Message(target, mine.contiguous(), 0, what)] if 0 <= target < self.size else []
            receives = [Message(source, halo, 0, what)] if 0 <= source < self.size else []
            self.transport.start(sends, receives).wait()
        return halo

    def same(self, at: int, back: int, count: int) -> Tensor | None:
        """(count, R, 1): whether tokens see the ones ``back`` tokens before; None if all do.

        ``at`` is the first of them, counted from the first token of the shard.
        """
        if self.documents is None:
            return None
        first = self.tokens + at
        now = self.documents[:, first : first + count]
        then = self.documents[:, first - back : first - back + count]
        return ((now == then) & (now >= 0)).T[..., None]


class _Convolution(torch.autograd.Function):
    """Sums of shifted products, in one order; so is the gradient of x, whose last terms come from behind."""

    @staticmethod
    @torch.compiler.disable
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, halo: _Halo) -> Tensor:
        with without_autocast(x.device):
            padded = torch.cat([halo.before(x), x])
            out = _summed(padded, weight, halo, range(halo.tokens, -1, -1), 0)
            if bias is not None:
                out = out + bias
        ctx.save_for_backward(padded, weight, bias)
        ctx.halo = halo
        return out.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.compiler.disable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        padded, weight, bias = ctx.saved_tensors
        halo: _Halo = ctx.halo
        with without_autocast(dout.device):
            both = torch.cat([dout, halo.behind(dout)])
            dx = _summed(both, weight, halo, range(halo.tokens + 1), 1).to(dout.dtype)
            dweight = _weight_gradient(dout, padded, halo)
            dbias = None if bias is None else dout.to(dweight.dtype).sum((0, 1)).to(bias.dtype)
        return dx, dweight.to(weight.dtype), dbias, None


def _summed(x: Tensor, weight: Tensor, halo: _Halo, starts: range, ahead: int) -> Tensor:
    """sum_j weight[:, W - 1 - j] * x[starts[j] + t], of pairs of tokens that see each other.

    ``ahead`` is 1 where the term j belongs to the token j tokens ahead, as in the gradient, and 0 where it is j behind.
    """
    dtype, tokens = accumulator_dtype(x.dtype), x.shape[0] - halo.tokens
    rows = weight.to(dtype).unbind(1)
    total = None
    for back, start in enumerate(starts):
        part = x[start : start + tokens].to(dtype) * rows[halo.tokens - back]
        same = halo.same(ahead * back, back, tokens)
        part = part if same is None else torch.where(same, part, 0.0)
        total = part if total is None else total + part
    assert total is not None, "a convolution has a width of at least one"
    return total


def _weight_gradient(dout: Tensor, padded: Tensor, halo: _Halo) -> Tensor:
    dtype, tokens = accumulator_dtype(dout.dtype), dout.shape[0]
    dout = dout.to(dtype)
    columns = []
    for back in range(halo.tokens, -1, -1):
        part = dout * padded[halo.tokens - back : halo.tokens - back + tokens].to(dtype)
        same = halo.same(0, back, tokens)
        columns.append((part if same is None else torch.where(same, part, 0.0)).sum((0, 1)))
    return torch.stack(columns, 1)


def _halo(x: Tensor, width: int, layout: SequenceLayout, masks: Masks, group: Group | None) -> _Halo:
    """The halo of such inputs; the first time, compared with those of the other ranks."""
    key = (tuple(x.shape), x.dtype, x.device, width, masks)
    known = _HALOS.setdefault(group, OrderedDict()) if group is not None else OrderedDict[Any, _Halo]()
    if key not in known:
        known[key] = _new_halo(x, width, layout, masks, group)
        if len(known) > MAX_HALOS:  # the same one on all ranks, because they make the same calls
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def _new_halo(x: Tensor, width: int, layout: SequenceLayout, masks: Masks, group: Group | None) -> _Halo:
    rank, tokens, halo = rank_in(group), x.shape[0], width - 1
    packings = packings_of(masks, tokens * layout.cp_size)
    transport = connect(group) if group is not None and layout.cp_size > 1 else None
    facts = f"x {tuple(x.shape)} {x.dtype}, {width} tokens wide"
    agreement = Agreement(transport, f"a causal convolution on {layout}")
    agreement.check(f"{facts}, {shown(masks)}", f"{shortened(shown(masks))} mask, {facts}")
    positions = range(rank * tokens - halo, (rank + 1) * tokens + halo)
    documents = None
    if not all(packing.is_plain for packing in packings):
        documents = torch.stack([packing.ids(positions, x.device) for packing in packings])
    return _Halo(rank, layout.cp_size, halo, transport, documents)


MAX_HALOS = 64
"""Kinds of inputs that are remembered as agreed on, those used last."""

_HALOS: weakref.WeakKeyDictionary[Any, OrderedDict[Any, _Halo]] = weakref.WeakKeyDictionary()
"""By group; dropped with it."""
