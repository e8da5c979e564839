"""Which tensors of a file make up which tensors of a checkpoint, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_lightseq.convert.families.family import Names, Place, Rule, places
from megatron_lightseq.convert.skeleton import Entry
from megatron_lightseq.convert.source import Stored
from megatron_lightseq.errors import CheckpointError, UnsupportedError, explain

TIED_OUTPUT = "lm_head.weight"
"""Some files hold the output layer although it is the embedding; then it must be the same."""
COMPUTED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Endings of tensors that old files hold and that follow from the configuration."""
SHOWN = 6
"""Problems that one error lists."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """One tensor of the checkpoint and where it is found in the file."""

    entry: Entry
    rule: Rule
    places: tuple[Place, ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors at :attr:`places`, of one expert where there is one."""
        parts = self.rule.form.split(torch.empty(self.entry.shape, device="meta"))
        return [tuple(part.shape) for part in parts]


def map_entries(entries: tuple[Entry, ...], names: Names) -> list[Mapped]:
    """The table applied to a model; raises UnsupportedError for tensors that the table does not name."""
    found: list[Mapped] = []
    unknown: list[str] = []
    for entry in entries:
        placed = places(names, entry.name)
        if placed is None:
            unknown.append(entry.name)
        else:
            found.append(Mapped(entry, *placed))
    if unknown:
        raise UnsupportedError(
            explain(
                got=f"a model with {_listed(unknown)}",
                rule="every tensor needs a counterpart in the Hugging Face model of its family",
                remedy="Convert a model without them",
            )
        )
    return found


def check_source(
    mapped: list[Mapped],
    stored: Mapping[str, Stored],
    dtype: torch.dtype | None,
    left_out: str | None = None,
) -> torch.dtype:
    """Check names, shapes and dtypes of everything that will be read.

    Args:
        mapped: the model.
        stored: what the files say that they hold.
        dtype: to convert to; default: all tensors must have one.
        left_out: prefix of tensors that the files may hold beside the model's.

    Returns:
        The dtype of the checkpoint.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape.
        UnsupportedError: tensors of several dtypes, or of one in which nothing is trained.
    """
    wanted = wanted_shapes(mapped)
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    for name, shape in wanted.items():
        if name in stored and stored[name].shape != shape:
            problems.append(
                f"{name} in {stored[name].file} has shape {list(stored[name].shape)}, "
                f"and config.json says {list(shape)}"
            )
    used = {*wanted, TIED_OUTPUT}
    left = [name for name in stored if name not in used and not name.endswith(COMPUTED)]
    left = [name for name in left if left_out is None or not name.startswith(left_out)]
    problems += [
        f"{name} in {stored[name].file} is no part of the model that config.json describes" for name in left
    ]
    if problems:
        raise CheckpointError(
            explain(
                got=_listed(problems, "; "),
                rule="the files hold exactly the tensors of the model",
                remedy="Download or save the model again, with the config.json that belongs to it",
            )
        )
    in_float32 = {place.name for one in mapped if one.rule.float32 for place in one.places}
    return _common_dtype({name: stored[name] for name in wanted if name not in in_float32}, dtype)


def wanted_shapes(mapped: list[Mapped]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file with its whole shape, in the order of the model."""
    found: dict[str, tuple[int, ...]] = {}
    experts: dict[str, int] = {}
    for one in mapped:
        for place, shape in zip(one.places, one.shapes, strict=True):
            if place.expert is not None:
                experts[place.name] = max(experts.get(place.name, 0), place.expert + 1)
                shape = (experts[place.name], *shape)
            found[place.name] = shape
    return found


def _common_dtype(stored: Mapping[str, Stored], asked: torch.dtype | None) -> torch.dtype:
    by_dtype = {one.dtype: name for name, one in reversed(list(stored.items()))}  # the first name of each
    shown = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in by_dtype.items())
    convertible = all(isinstance(dtype, torch.dtype) for dtype in by_dtype)
    if convertible and asked is not None:
        return asked
    only = next(iter(by_dtype))
    if len(by_dtype) == 1 and only in (torch.float32, torch.bfloat16):
        assert isinstance(only, torch.dtype)
        return only
    remedy = "Convert all of them with --dtype float32 or --dtype bfloat16"
    raise UnsupportedError(
        explain(
            got=shown,
            rule="weights are all float32 or all bfloat16, in which recipes train",
            remedy=remedy if convertible else "Use the model before its quantisation",
        )
    )


def _listed(problems: list[str], separator: str = ", ") -> str:
    more = len(problems) - SHOWN
    return separator.join(problems[:SHOWN]) + (f"{separator}and {more} more" if more > 0 else "")
