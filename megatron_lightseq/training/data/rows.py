"""Rows of a micro-batch: of each, the tokens that one context-parallel rank holds are read, and no others.

A row is the text of several stretches of a corpus, one behind the other. It has one token more than the sequence:
labels are the tokens one further on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lightseq.layout import SequenceLayout

Ids = npt.NDArray[np.int64]


class Stretch(NamedTuple):
    """Consecutive tokens of one sequence of a corpus."""

    sequence: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Row:
    """What a rank holds of one row; each array has one value per local token, in the order of its shard."""

    tokens: Ids
    labels: Ids
    loss_mask: npt.NDArray[np.float32]
    stretches: tuple[Stretch, ...]
    """Of the whole row, which all ranks that hold a part of it must agree on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataShare:
    """Which part of each global batch a rank reads: the same for all tensor and pipeline parallel ranks."""

    rank: int = 0
    """Data parallel rank."""
    size: int = 1
    """Number of data parallel ranks."""
    layout: SequenceLayout = field(default_factory=lambda: SequenceLayout.contiguous(1))
    """Which context-parallel rank holds which tokens."""
    cp_rank: int = 0
    """Context-parallel rank."""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"data parallel rank {self.rank} of {self.size}"

    def positions(self, length: int) -> list[range]:
        """Positions of this rank's tokens in a sequence of ``length`` tokens, in the order of its shard."""
        layout = self.layout
        layout.check_length(length)
        return [layout.chunk_positions(chunk, length) for chunk in layout.chunks_of(self.cp_rank)]


def part_of(positions: range, first: int, end: int) -> tuple[range, int]:
    """Those of ascending positions that lie in [first, end), and how many come before them."""
    before, last = (
        min(len(positions), max(0, -((positions.start - edge) // positions.step))) for edge in (first, end)
    )
    return positions[before : max(before, last)], before


def read_text(dataset: Any, stretches: Sequence[Stretch], positions: range, fill: int) -> Ids:
    """The tokens at some positions of a text.

    Args:
        dataset: Megatron's IndexedDataset.
        stretches: what the text is made of.
        positions: ascending.
        fill: the token behind the last stretch.
    """
    found = np.full(len(positions), fill, dtype=np.int64)
    start = 0
    for stretch in stretches:
        inside, before = part_of(positions, start, start + stretch.length)
        if inside:
            content = dataset.get(
                stretch.sequence,
                offset=stretch.offset + inside[0] - start,
                length=inside[-1] - inside[0] + 1,
            )
            found[before : before + len(inside)] = content[:: positions.step]
        start += stretch.length
    return found


def tokens_and_labels(
    dataset: Any, stretches: Sequence[Stretch], positions: Sequence[range], fill: int = -1
) -> tuple[Ids, Ids]:
    """Tokens and labels at the positions of a shard; consecutive ones are read once for both."""
    tokens, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for each in positions:
        if each.step == 1:
            text = read_text(dataset, stretches, range(each.start, each.stop + 1), fill)
            tokens.append(text[:-1])
            labels.append(text[1:])
        else:
            tokens.append(read_text(dataset, stretches, each, fill))
            labels.append(
                read_text(dataset, stretches, range(each.start + 1, each.stop + 1, each.step), fill)
            )
    return np.concatenate(tokens), np.concatenate(labels)
