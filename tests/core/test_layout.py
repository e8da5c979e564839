from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lightseq.errors import LayoutError
from megatron_lightseq.layout import LAYOUTS, SequenceLayout

layouts = st.builds(SequenceLayout, st.sampled_from(sorted(LAYOUTS)), st.integers(1, 8), st.integers(1, 3))


@given(layouts, st.integers(1, 4))
def test_every_token_is_held_once(layout: SequenceLayout, scale: int) -> None:
    seq_length = 2 * layout.cp_size * scale
    held = [p for rank in range(layout.cp_size) for p in layout.positions(rank, seq_length)]
    assert sorted(held) == list(range(seq_length))
    assert SequenceLayout.parse(str(layout)) == layout


@given(layouts, st.integers(0, 2))
def test_shard_follows_positions_and_unshard_inverts(layout: SequenceLayout, dim: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = 4 * layout.cp_size
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts = [layout.shard(x, rank, dim) for rank in range(layout.cp_size)]
    for rank, part in enumerate(parts):
        torch.testing.assert_close(
            part, x.index_select(dim, torch.tensor(layout.positions(rank, shape[dim])))
        )
    torch.testing.assert_close(layout.unshard(parts, dim - 3), x)


def test_zigzag_is_megatrons() -> None:
    assert SequenceLayout.zigzag(2).positions(0, 8) == [0, 1, 6, 7]
    assert SequenceLayout.zigzag(2).positions(1, 8) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("layout", "seq_length", "text"),
    [
        (SequenceLayout.contiguous(3), 10, "seq_length 10 over cp_size 3: .* multiple of cp_size = 3"),
        (SequenceLayout.zigzag(2), 6, "multiple of 2 x cp_size = 4"),
        (SequenceLayout.striped(4), 2, "seq_length 2 over cp_size 4"),
    ],
)
def test_lengths_that_do_not_divide_are_refused(layout: SequenceLayout, seq_length: int, text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        layout.shard(torch.zeros(seq_length), 0, 0)


@pytest.mark.parametrize("text", ["contiguous", "diagonal(2)", "zigzag(0)", "zigzag(2)/0"])
def test_bad_layout_text_is_refused(text: str) -> None:
    with pytest.raises(LayoutError, match="layout"):
        SequenceLayout.parse(text)


def test_unshard_needs_one_part_per_rank() -> None:
    with pytest.raises(LayoutError, match=r"1 parts: .* 2 ranks"):
        SequenceLayout.zigzag(2).unshard([torch.zeros(4)], 0)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("cp_size", "size"), [(4, 1), (4, 2), (6, 3), (5, 5), (8, 4)])
def test_merged_groups_hold_their_members_shards(name: str, cp_size: int, size: int) -> None:
    """``landing`` puts the tokens of every member where the merged layout expects them."""
    layout, seq_length = SequenceLayout(name, cp_size), cp_size * 6
    merged = layout.merged(size)
    for group in range(merged.cp_size):
        held: list[int | None] = [None] * (6 * size)
        for rank in layout.members(group, size):
            positions = layout.positions(rank, seq_length)
            for there, here in layout.landing(rank, size, 6):
                held[here] = positions[there]
        assert held == merged.positions(group, seq_length)
    everyone = [rank for group in range(merged.cp_size) for rank in layout.members(group, size)]
    assert sorted(everyone) == list(range(cp_size))


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layout, x: layout.shard(x, 2, 1), "rank 2: .* ranks 0 to 1"),
        (lambda layout, x: layout.shard(x, -1, 1), "rank -1: .* ranks 0 to 1"),
        (lambda layout, x: layout.positions(2, 8), "rank 2: .* ranks 0 to 1"),
        (lambda layout, x: layout.chunks_of(-1), "rank -1: .* ranks 0 to 1"),
        (lambda layout, x: layout.shard(x, 0, 2), r"dimension 2 of a tensor of shape \(4, 8\): .*0 to 1"),
        (lambda layout, x: layout.shard(x, 0, -3), r"dimension -3 of a tensor of shape \(4, 8\): .*-2 to -1"),
        (lambda layout, x: layout.shard(x[0, 0], 0, 0), r"dimension 0 of .*\(\): it has none"),
        (lambda layout, x: layout.unshard([x, x], 2), "dimension 2 of a tensor"),
        (
            lambda layout, x: layout.unshard([x, x[:1]], 1),
            r"shapes \(4, 8\), \(1, 8\): all ranks hold equally",
        ),
    ],
)
def test_ranks_and_dimensions_that_are_not_there_are_refused(
    name: str, call: Callable[[SequenceLayout, torch.Tensor], Any], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        call(SequenceLayout(name, 2), torch.zeros(4, 8))


def test_dealt_pieces_alternate_between_nodes_of_eight() -> None:
    assert SequenceLayout("dealt", 16).owner == tuple(rank for i in range(8) for rank in (i, i + 8))
    for size in (1, 3, 8, 12):
        assert SequenceLayout("dealt", size).owner == tuple(range(size))
