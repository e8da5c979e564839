"""From a dense mask, as Megatron-Core and Hugging Face hand it to attention, to the mask that it is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.mask import Mask, Term
from megatron_lightseq.mask.edge import NOTHING, edge_of
from megatron_lightseq.mask.recognise import documents_of


def mask_from_dense(allowed: Tensor, most_terms: int = 4) -> Mask | None:
    """The :class:`Mask` that allows what a dense mask allows; exact.

    Causal and full masks and windows come back for any length, every other mask for its own. Reads the whole tensor, so
    call it once per batch: on a GPU it waits for the device.

    Args:
        allowed: (S, S) or (B, 1, S, S), bool; True where the query (first S) may attend to the key (second S).
        most_terms: intervals of keys per query up to which it is worth one kernel call for each.

    Returns:
        None where the batch rows differ, or where a query sees its keys in more than ``most_terms`` intervals.

    Raises:
        ConfigError: the tensor has another shape or dtype.
    """
    rows = _one_for_all_rows(allowed)
    if rows is None:
        return None
    length = rows.shape[0]
    edges = torch.nn.functional.pad(rows.to("cpu", torch.int8), (1, 1)).diff(dim=1)
    number = (edges > 0).sum(1)
    num_terms = int(number.max()) if length else 0
    if num_terms > most_terms:
        return None
    # The k-th rising and the k-th falling edge of a row bound its k-th interval.
    index_in_row = torch.arange(int(number.sum())) - (number.cumsum(0) - number).repeat_interleave(number)
    bounds = torch.full((2, num_terms, length), NOTHING)
    for side, sign in enumerate((1, -1)):
        row, key = (edges == sign).nonzero(as_tuple=True)
        bounds[side, index_in_row, row] = key
    terms = tuple(Term(*(edge_of(_pieces(edge)) for edge in bounds[:, term])) for term in range(num_terms))
    documents = documents_of(terms, length)
    if documents is not None and documents[0] == (0, length):
        return Mask.window(*documents[1])
    return Mask(terms, length)


def _one_for_all_rows(allowed: Tensor) -> Tensor | None:
    """(S, S); None where rows of the batch differ."""
    shape = tuple(allowed.shape)
    is_batch = allowed.dim() == 4 and shape[0] > 0 and shape[1] == 1
    if allowed.dtype != torch.bool or not (allowed.dim() == 2 or is_batch) or shape[-1] != shape[-2]:
        raise ConfigError(
            explain(
                got=f"a dense mask {shape} of {allowed.dtype}",
                rule="a dense mask is (S, S) or (B, 1, S, S) of torch.bool, True where a query may attend to a key",
                remedy="Invert Megatron's masks, which are True where attention is masked out",
            )
        )
    if is_batch:
        first = allowed[0, 0]
        return first if bool((allowed == first).all()) else None
    return allowed


def _pieces(edge: Tensor) -> Iterator[tuple[int, int, bool]]:
    """Pieces ``(end, offset, moving)`` of an edge (S,) that is given for every query."""
    length = len(edge)
    steps = edge.diff()
    breaks = (steps != 0) & (steps != 1)
    breaks[1:] |= steps[1:] != steps[:-1]
    firsts = [0, *(breaks.nonzero().squeeze(1) + 1).tolist()]
    values = edge[firsts].tolist()
    for first, end, value in zip(firsts, (*firsts[1:], length), values, strict=True):
        moving = end - first > 1 and int(steps[first]) == 1
        yield end, value - first if moving else value, moving
