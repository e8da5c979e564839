from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lightseq.errors import ConfigError, LayoutError
from megatron_lightseq.layout import LAYOUTS, SequenceLayout
from megatron_lightseq.mask import Mask

layouts = st.builds(SequenceLayout, st.sampled_from(sorted(LAYOUTS)), st.integers(1, 8), st.integers(1, 3))


@st.composite
def masks(draw: st.DrawFn, seq_length: int) -> Mask:
    bound = st.none() | st.integers(0, seq_length)
    inner = draw(st.none() | st.lists(st.integers(0, seq_length), max_size=5).map(sorted))
    return Mask(
        left=draw(bound),
        right=draw(bound),
        cu_seqlens=None if inner is None else (0, *inner, seq_length),
    )


def allowed(mask: Mask, p: int, s: int) -> bool:
    """The definition, written the slow way."""
    in_window = (mask.left is None or p - s <= mask.left) and (mask.right is None or s - p <= mask.right)
    bounds = mask.cu_seqlens or (0, max(p, s) + 1)
    document = [a <= p < b for a, b in pairwise(bounds)]
    return in_window and document == [a <= s < b for a, b in pairwise(bounds)]


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


def test_unshard_wants_one_part_a_rank() -> None:
    with pytest.raises(LayoutError, match=r"1 parts: .* 2 ranks"):
        SequenceLayout.zigzag(2).unshard([torch.zeros(4)], 0)


@given(st.data(), layouts, st.integers(1, 5))
def test_band_and_segments_are_the_mask(data: st.DataObject, layout: SequenceLayout, scale: int) -> None:
    seq_length = 2 * layout.cp_size * scale
    mask = data.draw(masks(seq_length))
    chunk = st.integers(0, layout.num_chunks - 1)
    q, k = (layout.chunk_positions(data.draw(chunk), seq_length) for _ in range(2))
    lo, hi = mask.band(q, k)
    rows = {i: s for s in mask.segments(q, k) for i in range(s.q_start, s.q_stop)}
    got = {
        (i, j)
        for i, segment in rows.items()
        for j in range(segment.k_start, segment.k_stop)
        if lo <= j - i <= hi
    }
    want = {(i, j) for i, p in enumerate(q) for j, s in enumerate(k) if allowed(mask, p, s)}
    assert got == want
    assert mask.area(q, k) == len(want)


@given(st.data(), st.integers(1, 12))
def test_and_is_intersection_and_text_round_trips(data: st.DataObject, n: int) -> None:
    a, b = data.draw(masks(n)), data.draw(masks(n))
    both = a & b
    assert Mask.parse(str(both)) == both
    for p in range(n):
        for s in range(n):
            assert allowed(both, p, s) == (allowed(a, p, s) and allowed(b, p, s))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Mask.window(-1, 0), "neither side is negative"),
        (lambda: Mask.documents([0, 5, 3]), r"cu_seqlens \(0, 5, 3\)"),
        (lambda: Mask.documents([1, 5]), "start at 0"),
        (lambda: Mask.documents([0, 4]) & Mask.documents([0, 5]), "ending at 4 and at 5"),
        (lambda: Mask.parse("triangular"), "mask text 'triangular'"),
        (lambda: Mask.documents([0, 4]).check_length(5), "ending at 4 for 5 tokens"),
    ],
)
def test_bad_masks_are_refused(make, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=text):
        make()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("cp_size", "size"), [(4, 1), (4, 2), (6, 3), (5, 5), (8, 4)])
def test_merged_groups_hold_their_members_shards(name: str, cp_size: int, size: int) -> None:
    """Landing puts every member's tokens where the merged layout says that they are."""
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
