"""What attention accepts as inputs, and the facts about them that a plan depends on.

Shape letters: S = local tokens, B = batch, H = query heads, G = key/value heads (query groups), D = head dim of
queries and keys, Dv = head dim of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import TensorShape

Masks = Mask | tuple[Mask, ...]
"""One mask for all rows of a batch, or one for each row; not all of them equal."""
MaskArgument = Mask | Sequence[Mask]
"""What users give: one mask for all rows of a batch, or one for each row."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The facts about q, k and v that a plan depends on."""

    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        """Check the inputs and take their facts.

        Raises:
            ConfigError: shapes, dtypes or devices do not fit together.
            UnsupportedError: distributed, nested, sparse or meta tensors.
        """
        _check_inputs(q, k, v)
        return Inputs(tuple(q.shape), tuple(k.shape), tuple(v.shape), q.dtype, q.device)

    @property
    def shape(self) -> TensorShape:
        """The shape in the form that schedules use."""
        return TensorShape(
            batch=self.q_shape[1],
            num_heads=self.q_shape[2],
            num_query_groups=self.k_shape[2],
            head_dim=self.q_shape[3],
            v_head_dim=self.v_shape[3],
            element_bytes=self.dtype.itemsize,
        )

    def describe(self) -> str:
        """For messages and fingerprints."""
        return f"q {self.q_shape}, k {self.k_shape}, v {self.v_shape}, {self.dtype}"


def autocast_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as torch's scaled_dot_product_attention takes them under ``torch.autocast``: all in its dtype.

    fp64 stays as it is, and without autocast, everything does. Differentiable.
    """
    device = q.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        eligible = x.is_floating_point() and x.dtype != torch.float64 and x.device.type == device
        return x.to(dtype) if eligible else x

    return cast(q), cast(k), cast(v)


def masks_of(given: MaskArgument, batch: int) -> Masks:
    """The masks of a batch: one, unless its rows differ.

    Args:
        given: a mask, or one for each row.
        batch: rows.

    Raises:
        ConfigError: there are more or fewer masks than rows, or something that is no mask.
    """
    if isinstance(given, Mask):
        return given
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        shape = f" of shape {tuple(given.shape)}" if isinstance(given, Tensor) else ""
        raise ConfigError(
            explain(
                got=f"mask= a {type(given).__name__}{shape}",
                rule="it is a Mask, or one Mask for each row of the batch",
                remedy="Read a dense boolean mask with megatron_lightseq.kernels.dense_mask.mask_from_dense",
            )
        )
    masks = tuple(given)
    if len(masks) != batch or not all(isinstance(mask, Mask) for mask in masks):
        raise ConfigError(
            explain(
                got=f"{len(masks)} masks ({', '.join(sorted({type(mask).__name__ for mask in masks}))}) "
                f"for a batch of {batch}",
                rule="mask= is one Mask, or one Mask for each row of the batch",
                remedy="Give as many masks as q has rows in its dimension 1",
            )
        )
    return masks[0] if all(mask == masks[0] for mask in masks[1:]) else masks


def check_sink(sink: Tensor | None, q: Tensor) -> None:
    """Raise :class:`ConfigError` unless ``sink`` is None or has one logit per query head of q, on its device."""
    if sink is not None and (tuple(sink.shape) != (q.shape[2],) or sink.device != q.device):
        raise ConfigError(
            explain(
                got=f"a sink {tuple(sink.shape)} on {sink.device} for q {tuple(q.shape)} on {q.device}",
                rule="a sink has one logit for each query head, on q's device",
                remedy=f"Give a tensor of shape ({q.shape[2]},)",
            )
        )


def check_softcap(softcap: float | None) -> None:
    """Raise :class:`ConfigError` unless ``softcap`` is None or a positive, finite number."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ConfigError(
            explain(
                got=f"softcap {softcap}",
                rule="scores are bounded by a positive, finite number",
                remedy="Leave it out for scores without a bound",
            )
        )


_RULES: tuple[tuple[str, Callable[[Tensor, Tensor, Tensor], bool]], ...] = (
    (
        "q, k and v have 4 dimensions: tokens, batch, heads, head dim",
        lambda q, k, v: q.dim() == k.dim() == v.dim() == 4,
    ),
    (
        "q, k and v have one dtype and one device",
        lambda q, k, v: len({(x.dtype, x.device) for x in (q, k, v)}) == 1,
    ),
    ("the dtype is a floating-point type", lambda q, k, v: q.is_floating_point()),
    ("q, k and v hold the same tokens and batch", lambda q, k, v: q.shape[:2] == k.shape[:2] == v.shape[:2]),
    ("a shard holds at least one token", lambda q, k, v: q.shape[0] > 0),
    ("k and v have the same heads", lambda q, k, v: k.shape[2] == v.shape[2]),
    (
        "the key/value heads divide the query heads",
        lambda q, k, v: k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0,
    ),
    ("q and k have the same head dim", lambda q, k, v: q.shape[3] == k.shape[3]),
)


def check_kind(name: str, x: Tensor) -> None:
    """Raise :class:`UnsupportedError` unless ``x`` is an ordinary tensor, with its values in memory on this rank."""
    if hasattr(x, "device_mesh"):
        kind, remedy = "a DTensor", f"Give this rank's shard, {name}.to_local()"
    elif x.is_nested:
        kind, remedy = (
            "a nested tensor",
            "Pack the sequences into one tensor, and give mask=Mask.documents(...)",
        )
    elif x.layout != torch.strided:
        kind, remedy = f"a tensor of layout {x.layout}", f"Give {name}.to_dense()"
    elif x.is_meta:
        kind, remedy = (
            "a meta tensor, which has no values",
            "Materialise the model before its first forward pass",
        )
    else:
        return
    raise UnsupportedError(
        explain(got=f"{name}: {kind}", rule="kernels read ordinary tensors of this rank", remedy=remedy)
    )


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_kind(name, x)
    for rule, holds in _RULES:
        if not holds(q, k, v):
            shown = ", ".join(
                f"{name} {tuple(x.shape)} {x.dtype} on {x.device}"
                for name, x in (("q", q), ("k", k), ("v", v))
            )
            raise ConfigError(
                explain(
                    got=shown,
                    rule=rule,
                    remedy="Give local shards as (S, B, H, D), (S, B, G, D), (S, B, G, Dv)",
                )
            )
