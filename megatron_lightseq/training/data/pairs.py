"""How packed corpora store documents: as pairs of sequences, one whose tokens are given and one whose are learned.

A prompt with its answer is one pair. A conversation is several, and between two pairs of the same document lies a
joint: a pair without any token, which no document begins or ends with.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

JOINT = (0, 0)


def first_parts(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """The number of the first sequence of each document.

    Args:
        lengths: of all sequences: given, learned, given, learned, ...
    """
    is_joint = (np.asarray(lengths).reshape(-1, 2) == 0).all(axis=1)
    follows_joint = np.concatenate([[False], is_joint[:-1]])
    return 2 * np.flatnonzero(~is_joint & ~follows_joint)


def document_lengths(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Tokens of each document; ``lengths`` as above."""
    starts = first_parts(lengths)
    return np.add.reduceat(np.asarray(lengths, dtype=np.int64), starts) if len(starts) else starts


def pairs_of(
    tokens: npt.NDArray[np.integer], learned: npt.NDArray[np.bool_]
) -> Iterable[npt.NDArray[np.integer]]:
    """The sequences of one document: runs of given and learned tokens by turns, with joints between pairs."""
    borders = np.flatnonzero(np.diff(learned.astype(np.int8))) + 1
    runs = np.split(tokens, borders)
    if len(learned) and learned[0]:
        runs.insert(0, tokens[:0])
    if len(runs) % 2:
        runs.append(tokens[:0])
    for number in range(0, len(runs), 2):
        if number:
            yield from (tokens[:0], tokens[:0])
        yield runs[number]
        yield runs[number + 1]
