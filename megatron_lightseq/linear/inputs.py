"""What linear attention accepts as inputs, and the facts about them that a plan depends on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lightseq.attention.inputs import check_kind
from megatron_lightseq.errors import ConfigError, LayoutError, UnsupportedError, explain
from megatron_lightseq.kernels.registry import accumulator_dtype
from megatron_lightseq.kernels.specs import AUTO
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.schedule.scan_choose import StateShape
from megatron_lightseq.schedule.scan_place import SCANS

_REMEDY = (
    "Give local shards: q (S, B, H, K), k (S, B, G, K), v (S, B, G, V), log_decay (S, B, H) or (S, B, H, K), "
    "beta (S, B, H)"
)


@dataclass(frozen=True, slots=True)
class LinearInputs:
    """The facts about the inputs that a plan depends on."""

    shapes: tuple[tuple[int, ...] | None, ...]
    """Of q, k, v, log_decay and beta; None for one that is None."""
    dtypes: tuple[torch.dtype | None, ...]
    device: torch.device

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> LinearInputs:
        """Check the inputs and take their facts.

        Raises:
            ConfigError: shapes, dtypes or devices do not fit together.
            UnsupportedError: distributed, nested, sparse or meta tensors.
        """
        given = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
        tensors = {name: x for name, x in given.items() if x is not None}
        for name, x in tensors.items():
            check_kind(name, x)
        for rule, holds in _RULES:
            if not holds(q, k, v, log_decay, beta):
                shown = ", ".join(f"{n} {tuple(x.shape)} {x.dtype} on {x.device}" for n, x in tensors.items())
                raise ConfigError(explain(got=shown, rule=rule, remedy=_REMEDY))
        return LinearInputs(
            tuple(None if x is None else tuple(x.shape) for x in given.values()),
            tuple(None if x is None else x.dtype for x in given.values()),
            q.device,
        )

    @property
    def q_shape(self) -> tuple[int, ...]:
        """(S, B, H or fewer, K)."""
        return self._shape(0)

    @property
    def v_shape(self) -> tuple[int, ...]:
        """(S, B, H or fewer, V)."""
        return self._shape(2)

    @property
    def heads(self) -> int:
        """H: of the output and of the states."""
        return max(self._shape(i)[2] for i in range(3))

    @property
    def transition(self) -> tuple[int, int]:
        """The last dimensions of what a run of tokens multiplies a state by: a number, a diagonal or a matrix."""
        key_dim, log_decay = self.q_shape[3], self.shapes[3]
        if self.shapes[4] is not None:
            return key_dim, key_dim
        return (key_dim if log_decay is not None and len(log_decay) == 4 else 1), 1

    def state_shape(self, pieces: int | None) -> StateShape:
        """The shape in the form that scans use.

        Args:
            pieces: maps that the map of one rank is made of; None if it is one.
        """
        dtype = self.dtypes[2]
        assert dtype is not None, "v has a dtype"
        return StateShape(
            batch=self.q_shape[1],
            heads=self.heads,
            key_dim=self.q_shape[3],
            value_dim=self.v_shape[3],
            transition=None if self.shapes[4] is not None else self.transition[0],
            pieces=pieces,
            element_bytes=accumulator_dtype(dtype).itemsize,
        )

    def _shape(self, index: int) -> tuple[int, ...]:
        shape = self.shapes[index]
        assert shape is not None, "q, k and v are not optional"
        return shape

    def describe(self) -> str:
        """For messages and fingerprints."""
        names = ("q", "k", "v", "log_decay", "beta")
        parts = zip(names, self.shapes, self.dtypes, strict=True)
        return ", ".join(f"{name} {shape} {dtype}" for name, shape, dtype in parts if shape is not None)


_Rule = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], bool]


def _heads(q: Tensor, k: Tensor, v: Tensor) -> int:
    return max(x.shape[2] for x in (q, k, v))


_RULES: tuple[tuple[str, _Rule], ...] = (
    (
        "q, k and v have 4 dimensions: tokens, batch, heads, head dim",
        lambda q, k, v, *_: q.dim() == k.dim() == v.dim() == 4,
    ),
    (
        "q, k and v have one dtype and one device",
        lambda q, k, v, *_: len({(x.dtype, x.device) for x in (q, k, v)}) == 1,
    ),
    ("the dtype is a floating-point type", lambda q, *_: q.is_floating_point()),
    (
        "q, k and v hold the same tokens and batch",
        lambda q, k, v, *_: q.shape[:2] == k.shape[:2] == v.shape[:2],
    ),
    ("no dimension is empty", lambda q, k, v, *_: min(*q.shape, *k.shape, *v.shape) > 0),
    (
        "the heads of q, k and v each divide the largest number among them, H",
        lambda q, k, v, *_: all(_heads(q, k, v) % x.shape[2] == 0 for x in (q, k, v)),
    ),
    ("q and k have the same head dim", lambda q, k, *_: q.shape[3] == k.shape[3]),
    (
        "log_decay and beta are floating-point numbers on q's device",
        lambda q, k, v, *gates: all(
            g is None or (g.is_floating_point() and g.device == q.device) for g in gates
        ),
    ),
    (
        "log_decay has one number for each of the H heads of a token, or one for each channel of its K",
        lambda q, k, v, g, b: (
            g is None
            or tuple(g.shape)
            in ((*q.shape[:2], _heads(q, k, v)), (*q.shape[:2], _heads(q, k, v), q.shape[3]))
        ),
    ),
    (
        "beta has one number for each of the H heads of a token",
        lambda q, k, v, g, b: b is None or tuple(b.shape) == (*q.shape[:2], _heads(q, k, v)),
    ),
)


def checked_scale(scale: float | None, key_dim: int) -> float:
    """The factor of the output; by default ``key_dim ** -0.5``.

    Raises:
        ConfigError: it is no positive, finite number.
    """
    value = float(key_dim**-0.5 if scale is None else scale)
    if not 0 < value < math.inf:
        raise ConfigError(
            explain(
                got=f"scale {value}",
                rule="outputs are multiplied by a positive, finite number",
                remedy="Leave it out for 1 / sqrt(K), or negate q",
            )
        )
    return value


def checked_scan(scan: str) -> str:
    """The name of a scan, or ``auto``.

    Raises:
        UnsupportedError: there is no such scan.
    """
    if scan not in (AUTO, *SCANS):
        raise UnsupportedError(
            explain(
                got=f"scan {scan!r}",
                rule=f"states travel by one of {', '.join(SCANS)}, or by the fastest of them, {AUTO}",
                remedy="Choose one of these names",
            )
        )
    return scan


def contiguous_layout(layout: str | SequenceLayout, size: int) -> SequenceLayout:
    """The layout of shards of adjacent tokens.

    Raises:
        LayoutError: it is for another number of ranks, or has no such name.
        UnsupportedError: ranks hold tokens that are not adjacent.
    """
    given = SequenceLayout(layout, size) if isinstance(layout, str) else layout
    if given.cp_size != size:
        raise LayoutError(
            explain(
                got=f"layout {given} over a group of {size} ranks",
                rule="a layout is for as many ranks as the group has",
                remedy="Build the layout with the group's size",
            )
        )
    if size > 1 and given.name != "contiguous":
        raise UnsupportedError(
            explain(
                got=f"linear attention or a causal convolution on {given}",
                rule="a state goes through the tokens in their order, so every rank holds adjacent ones",
                remedy="Cut the sequence with the contiguous layout, on which method lightseq is balanced as well",
            )
        )
    return SequenceLayout.contiguous(size)
