from __future__ import annotations

import copy
import pickle
import random
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import megatron_lightseq as mls
from megatron_lightseq.errors import ConfigError, UnsupportedError
from megatron_lightseq.kernels.dense_mask import mask_from_dense, mask_from_intervals, visible_intervals
from megatron_lightseq.kernels.reference import visible
from megatron_lightseq.kernels.tile_mask import TileMask
from megatron_lightseq.layout import LAYOUTS, SequenceLayout
from megatron_lightseq.mask import Line, Mask
from megatron_lightseq.transport import run_loopback
from megatron_lightseq.transport.group import Group
from tests.core.mask_kinds import KINDS, combined
from tests.core.oracle import dense

CPU = torch.device("cpu")
layouts = st.builds(SequenceLayout, st.sampled_from(sorted(LAYOUTS)), st.integers(1, 7), st.integers(1, 3))
lengths = st.integers(1, 14)


def whole(length: int) -> Mask:
    return Mask.documents((0, length), causal=False)


def pair_by_pair(allowed: Tensor) -> Mask:
    """The union of one mask per allowed pair."""
    length = len(allowed)
    found = Mask.sinks(0) & whole(length)
    for query, key in allowed.nonzero().tolist():
        found |= Mask.runs([(0, 0, 0)] * bool(query) + [(query, key, key + 1), (query + 1, 0, 0)], length)
    return found


# --- what is allowed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", KINDS, ids=lambda strategy: strategy.__name__)
@given(data=st.data(), length=lengths)
def test_a_kind_allows_what_its_definition_says(strategy, data: st.DataObject, length: int) -> None:  # type: ignore[no-untyped-def]
    mask, allowed = data.draw(strategy(length))
    assert torch.equal(dense(mask, length), allowed)


@given(st.data(), lengths)
def test_and_or_are_intersection_and_union(data: st.DataObject, length: int) -> None:
    mask, allowed = data.draw(combined(length))
    assert torch.equal(dense(mask, length), allowed)
    assert not mask.is_causal or torch.equal(allowed, allowed.tril())


@given(st.data(), lengths)
def test_masks_that_allow_the_same_are_equal(data: st.DataObject, length: int) -> None:
    mask, allowed = data.draw(combined(length))
    mask &= whole(length)
    other = pair_by_pair(allowed)
    assert mask == other
    assert (hash(mask), mask.digest(), str(mask)) == (hash(other), other.digest(), str(other))
    assert mask.is_causal == torch.equal(allowed, allowed.tril())


@given(st.data(), lengths)
def test_masks_that_differ_are_not_equal(data: st.DataObject, length: int) -> None:
    (a, allowed_a), (b, allowed_b) = data.draw(combined(length)), data.draw(combined(length))
    a, b = a & whole(length), b & whole(length)
    assert (a == b) == (a.digest() == b.digest()) == torch.equal(allowed_a, allowed_b)


@given(st.data(), lengths)
def test_text_reads_back(data: st.DataObject, length: int) -> None:
    mask, _ = data.draw(combined(length))
    assert Mask.parse(str(mask)) == mask
    assert " " not in str(mask)


@given(st.data(), layouts, st.integers(1, 3))
def test_area_counts_the_allowed_pairs_of_every_tile(
    data: st.DataObject, layout: SequenceLayout, scale: int
) -> None:
    length = 2 * layout.cp_size * scale
    mask, allowed = data.draw(combined(length))
    chunks = [layout.chunk_positions(chunk, length) for chunk in range(layout.num_chunks)]
    for queries in chunks:
        for keys in chunks:
            assert mask.area(queries, keys) == int(allowed[list(queries)][:, list(keys)].sum())


CORNERS = [
    "prefix(0,2,4,12;0,2,0)",
    "prefix(0,2,5,12;2,0,7)",
    "prefix(0,12;5)",
    "runs(12;0:0..2,4:p-3..p-1,7:none,9:2..inf)",
    "runs(12;0:none,2:p-2..p+2,6:0..p,10:9..inf)",
    "window(2,3)&documents(0,1,2,3,7,12)",
    "causal&padded(0,4,8,12;1,4,3)",
    "window(2,0)|causal&sinks(3)",
    "window(1,1)|globals(2)",
    "sinks(0)",
]
"""Adjacent pieces that a band could join incorrectly: constant below, inside and above the keys of a tile."""


def check_calls(mask: Mask, allowed: Tensor, layout: SequenceLayout) -> None:
    """Checks that every allowed pair of every tile is in exactly one call, and no other pair in any."""
    length = len(allowed)
    chunks = [layout.chunk_positions(chunk, length) for chunk in range(layout.num_chunks)]
    for queries, keys in product(filter(None, chunks), repeat=2):
        tiles = TileMask.of(mask, queries, keys, CPU)
        shown = [visible(tile, len(queries), len(keys), CPU).int() for tile in tiles]
        assert torch.equal(sum(shown), allowed[list(queries)][:, list(keys)].int()), (queries, keys)
        assert all(part.any() for part in shown) or len(tiles) == 1


@given(st.data(), layouts, st.integers(1, 3))
def test_calls_of_a_tile_show_every_allowed_pair_once(
    data: st.DataObject, layout: SequenceLayout, scale: int
) -> None:
    mask, allowed = data.draw(combined(2 * layout.cp_size * scale))
    check_calls(mask, allowed, layout)


@pytest.mark.parametrize("layout_name", sorted(LAYOUTS))
@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("text", CORNERS)
def test_calls_of_corner_cases(text: str, size: int, layout_name: str) -> None:
    mask = Mask.parse(text)
    check_calls(mask, dense(mask, 12), SequenceLayout(layout_name, size))


@pytest.mark.parametrize(
    ("mask", "band"),
    [
        (Mask.documents((0, 40, 100)), (-59, 0)),
        (Mask.documents((0, 40, 100), causal=False), (-59, 59)),
        (Mask.documents((0, 40, 100)) & Mask.window(50), (-50, 0)),
        (Mask.padded((0, 40, 100), (30, 45)), (-44, 0)),
        (Mask.prefix((0, 40, 100), (30, 10)), (-59, 29)),
        (Mask.shared_question([(20, 10, 10), (30, 30)]), (-59, 0)),
    ],
    ids=str,
)
def test_ranges_come_with_a_narrow_band(mask: Mask, band: tuple[int, int]) -> None:
    """Kernels use the band to skip tiles: without a narrow one they would check every row for every key."""
    tile, *_ = TileMask.of(mask, range(100), range(100), CPU)
    assert tile.key_ranges is not None
    assert (tile.band_lo, tile.band_hi) == band


def test_key_ranges_of_a_thousand_documents_are_those_of_a_loop() -> None:
    source = random.Random(0)
    borders = [0]
    for _ in range(1000):
        borders.append(borders[-1] + source.randint(1, 40))
    tokens = range(borders[-1])
    (tile,) = TileMask.of(Mask.documents(borders), tokens, tokens, CPU)
    assert tile.key_ranges is not None
    for first, end in pairwise(borders):
        rows = torch.arange(first, end)
        begin = torch.maximum(tile.key_ranges[0, first:end], rows + tile.band_lo)
        stop = torch.minimum(tile.key_ranges[1, first:end], rows + tile.band_hi + 1)
        assert (begin == first).all()
        assert torch.equal(stop, rows + 1)


def test_a_tile_within_one_document_needs_no_ranges() -> None:
    mask = Mask.documents((0, 100, 300)) & Mask.window(60)
    assert TileMask.of(mask, range(150, 200), range(100, 150), CPU) == (TileMask(-10, 50 - 1),)
    assert TileMask.of(mask, range(200, 300), range(200, 300), CPU) == (TileMask(-60, 0),)
    (crossing,) = TileMask.of(mask, range(50, 150), range(50, 150), CPU)
    assert crossing.key_ranges is not None


def test_a_tile_takes_a_call_for_each_term_with_work() -> None:
    mask = Mask.window(9) | Mask.sinks(2)
    early, late = range(32), range(32, 64)
    assert len(TileMask.of(mask, early, early, CPU)) == 2
    assert len(TileMask.of(mask, late, early, CPU)) == 2
    assert len(TileMask.of(mask, late, late, CPU)) == 1
    (nothing,) = TileMask.of(mask, early, late, CPU)
    assert not visible(nothing, 32, 32, CPU).any()


def test_strides_of_queries_and_keys_must_agree() -> None:
    for ask in (Mask.causal().area, lambda q, k: TileMask.of(Mask.causal(), q, k, CPU)):
        with pytest.raises(UnsupportedError, match="stride 2 against keys of stride 3"):
            ask(range(0, 8, 2), range(0, 9, 3))
    assert Mask.causal().area(range(4, 5), range(0, 9, 3)) == 2


# --- equality, text, hashing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Mask.window(None, 0), Mask.causal()),
        (Mask.window(None, None), Mask.full()),
        (Mask.causal() & Mask.full(), Mask.causal()),
        (Mask.full() & Mask.window(3, 2), Mask.window(3, 2)),
        (Mask.sinks(2, causal=False) & Mask.window(3), Mask.parse("runs(0:0..p+1,2:0..2,4:p-3..2,5:none)")),
        (
            Mask.parse("runs(0:none,3:0..p-2)") & Mask.window(5),
            Mask.parse("runs(0:none,3:0..p-2,6:p-5..p-2)"),
        ),
        (
            Mask.causal() | Mask.parse("runs(0:5..8)"),
            Mask.parse("runs(0:0..p+1,4:0..8,8:0..p+1)|runs(0:5..8,4:none)"),
        ),
        (Mask.causal() | Mask.full(), Mask.full()),
        (Mask.window(3, 0) | Mask.window(0, 2), Mask.window(3, 2)),
        (Mask.documents((0, 4, 4, 9)), Mask.documents((0, 4, 9))),
        (Mask.documents((0, 1, 2, 3)), Mask.documents((0, 1, 2, 3), causal=False)),
        (Mask.documents((0, 4, 9)) & Mask.window(4), Mask.documents((0, 4, 9))),
        (Mask.documents((0, 4, 9)) & Mask.documents((0, 6, 9)), Mask.documents((0, 4, 6, 9))),
        (Mask.documents((0, 4, 9)) | Mask.documents((0, 9)), Mask.documents((0, 9))),
        (Mask.documents((0, 4, 9)) | Mask.causal(), Mask.documents((0, 9))),
        (Mask.padded((0, 4, 9), (4, 5)), Mask.documents((0, 4, 9))),
        (Mask.padded((0, 4, 9), (3, 0)), Mask.padded((0, 9), (3,))),
        (Mask.prefix((0, 4, 9), (1, 0)), Mask.documents((0, 4, 9))),
        (Mask.prefix((0, 4, 9), (4, 5)), Mask.documents((0, 4, 9), causal=False)),
        (Mask.shared_question([(4,), (5,)]), Mask.documents((0, 4, 9))),
        (Mask.shared_question([(0, 4, 5)]), Mask.documents((0, 4, 9))),
        (Mask.chunked(4) & Mask.documents((0, 9)), Mask.documents((0, 4, 8, 9))),
        (Mask.chunked(4) & Mask.chunked(12), Mask.chunked(4)),
        (Mask.chunked(4) & Mask.window(3), Mask.chunked(4)),
        (Mask.chunked(4) | Mask.chunked(4, causal=False), Mask.chunked(4, causal=False)),
        (Mask.chunked(1), Mask.window(0, 0)),
        (Mask.sinks(0) | Mask.causal(), Mask.causal()),
        (Mask.sinks(4) | Mask.causal(), Mask.causal()),
        (Mask.sinks(2) | Mask.sinks(4), Mask.sinks(4)),
        (Mask.global_tokens(2) & Mask.causal(), Mask.sinks(2) | (Mask.global_tokens(2) & Mask.causal())),
        (Mask.runs([(0, 0, Line(1, moving=True))]), Mask.causal()),
        (Mask.runs([(0, 0, None)], 9), Mask.documents((0, 9), causal=False)),
        (
            (Mask.window(2) | Mask.sinks(1)) & whole(9),
            (Mask.sinks(1) & whole(9)) | (Mask.window(2) & whole(9)),
        ),
    ],
    ids=str,
)
def test_two_ways_to_write_one_mask(a: Mask, b: Mask) -> None:
    assert a == b
    assert (hash(a), a.digest(), str(a)) == (hash(b), b.digest(), str(b))


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (Mask.causal(), "causal"),
        (Mask.full(), "full"),
        (Mask.window(5, 0), "window(5,0)"),
        (Mask.window(None, 4), "window(inf,4)"),
        (Mask.documents((0, 3, 8)), "causal&documents(0,3,8)"),
        (Mask.documents((0, 1, 2, 8), causal=False), "documents(0,1,2,8)"),
        (Mask.documents((0, 3, 8), causal=False) & Mask.window(2, 1), "window(2,1)&documents(0,3,8)"),
        (Mask.window(0, 0) & whole(8), "window(0,0)&documents(0,8)"),
        (Mask.padded((0, 4, 9), (3, 5)), "causal&padded(0,4,9;3,5)"),
        (Mask.padded((0, 4, 9), (0, 5), causal=False), "padded(0,4,9;0,5)"),
        (Mask.prefix((0, 4, 9), (2, 3)), "prefix(0,4,9;2,3)"),
        (Mask.chunked(4), "causal&chunks(4)"),
        (Mask.chunked(4, causal=False), "chunks(4)"),
        (Mask.chunked(8) & Mask.window(2, 3), "window(2,0)&chunks(8)"),
        (Mask.sinks(4), "causal&sinks(4)"),
        (Mask.window(511) | Mask.sinks(4), "window(511,0)|causal&sinks(4)"),
        (Mask.window(5, 5) | Mask.sinks(4, causal=False), "window(5,5)|sinks(4)"),
        (Mask.global_tokens(2), "globals(2)"),
        (Mask.sinks(0), "sinks(0)"),
        (Mask.sinks(0) & whole(8), "sinks(0)&documents(0,8)"),
        (Mask.shared_question([(2, 1, 2)]), "runs(5;0:0..p+1,3:0..2)|runs(5;0:none,3:3..p+1)"),
        (Mask.runs([(0, 0, 4), (4, Line(-3, moving=True), None)]), "runs(0:0..4,4:p-3..inf)"),
    ],
)
def test_text_of_every_kind(mask: Mask, text: str) -> None:
    assert str(mask) == text
    assert Mask.parse(text) == mask
    assert Mask.parse(text.replace("|", " | ").replace("&", " & ").replace(",", ", ")) == mask


def test_or_binds_weaker_than_and() -> None:
    mask = Mask.parse("causal&documents(0,4,9)|sinks(2)&documents(0,9)")
    assert mask == Mask.documents((0, 4, 9)) | (Mask.sinks(2, causal=False) & whole(9))


@given(st.data(), lengths)
def test_a_mask_survives_copies_and_pickles_with_its_hash(data: st.DataObject, length: int) -> None:
    mask, _ = data.draw(combined(length))
    hash(mask)
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), eval(repr(mask))):
        assert other == mask
        assert hash(other) == hash(mask)


def test_a_mask_is_immutable() -> None:
    mask = Mask.causal()
    for target, name in ((mask, "length"), (mask.terms[0], "start"), (mask.terms[0].start, "firsts")):
        with pytest.raises(AttributeError):
            setattr(target, name, None)


def test_masks_do_not_grow_when_they_are_combined() -> None:
    """Adjacent pieces that form one piece are merged: the canonical form is also the shortest."""
    mask, causal = Mask.sinks(0) & whole(200), Line(1, moving=True)
    for first in range(0, 200, 10):
        mask |= Mask.runs([(0, 0, 0)] * bool(first) + [(first, 0, causal), (first + 10, 0, 0)], 200)
    assert mask == Mask.documents((0, 200))
    assert [len(edge.firsts) for term in mask.terms for edge in (term.start, term.stop)] == [1, 1]


def test_what_a_mask_says_of_itself() -> None:
    packed = Mask.documents((0, 4, 4, 9)) & Mask.window(2)
    assert (packed.cu_seqlens, packed.length, packed.window_size) == ((0, 4, 9), 9, None)
    assert (Mask.window(2).cu_seqlens, Mask.window(2).length, Mask.window(2).window_size) == (
        None,
        None,
        (2, 0),
    )
    assert Mask.padded((0, 4, 9), (3, 5)).cu_seqlens is None
    assert (Mask.chunked(4).window_size, Mask.sinks(2).window_size) == (None, None)
    assert (Mask.chunked(4) & whole(9)).cu_seqlens == (0, 4, 8, 9)
    assert Mask.full().keys_of(3)[0][:9] == range(9)
    assert (Mask.window(2) | Mask.sinks(2)).keys_of(9) == (range(2), range(7, 10))


# --- dense masks -------------------------------------------------------------------------------------------


@given(st.data(), lengths)
def test_a_dense_mask_becomes_the_mask_that_it_was_made_of(data: st.DataObject, length: int) -> None:
    mask, allowed = data.draw(combined(length))
    found = mask_from_dense(allowed, most_intervals=8)
    assert found is not None
    assert found & whole(length) == mask & whole(length)
    assert mask_from_dense(allowed.expand(3, 1, length, length), most_intervals=8) == found


@given(st.integers(1, 9), st.integers(0, 2**81))
def test_random_dense_masks_round_trip_unless_they_have_too_many_intervals(length: int, bits: int) -> None:
    allowed = torch.tensor([bool(bits >> i & 1) for i in range(length**2)]).reshape(length, length)
    intervals = max((row.int().diff(prepend=torch.zeros(1)) > 0).sum().item() for row in allowed)
    found = mask_from_dense(allowed, most_intervals=2)
    assert (found is None) == (intervals > 2)
    if found is not None:
        assert torch.equal(dense(found, length), allowed)


def test_dense_masks_of_the_common_kinds() -> None:
    ones = torch.ones(12, 12, dtype=torch.bool)
    padding = ones.tril()
    padding[:, 9:] = False
    assert mask_from_dense(ones.tril()) == Mask.causal()
    assert mask_from_dense(ones) == Mask.full()
    assert mask_from_dense(ones.tril().triu(-3)) == Mask.window(3)
    assert mask_from_dense(torch.block_diag(ones[:5, :5], ones[:7, :7]).tril()) == Mask.documents((0, 5, 12))
    assert mask_from_dense(padding) == Mask.causal() & Mask.runs([(0, 0, 9)], 12)
    padding[9:] = False
    assert mask_from_dense(padding) == Mask.padded((0, 12), (9,))
    assert mask_from_dense(~ones) == Mask.sinks(0) & whole(12)


def test_rows_of_several_ranks_together_are_a_mask() -> None:
    """Every rank finds the intervals of its rows. Gathered from all ranks, they form the mask."""
    layout, mask = SequenceLayout.zigzag(3), Mask.parse("window(4,0)|causal&sinks(2)")
    rows = [dense(mask, 24)[layout.positions(rank, 24)] for rank in range(3)]
    parts = [visible_intervals(part) for part in rows]
    assert mask_from_intervals(layout.unshard(parts, 0)) == mask & whole(24)
    assert mask_from_intervals(torch.tensor([[0, 1], [0, 2], [0, 3]])) == Mask.causal()
    assert mask_from_intervals(torch.tensor([[0, 1], [1, 2], [9, 2]])).keys_of(2) == ()


def test_dense_masks_that_are_no_one_mask() -> None:
    rows = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    rows[1, 0, 3, 1] = False
    assert mask_from_dense(rows) is None
    assert mask_from_dense(rows[:1]) == Mask.causal()
    assert mask_from_dense(rows[1:], most_intervals=1) is None


@pytest.mark.parametrize(
    "wrong", [torch.ones(4, 4), torch.ones(4, 5) > 0, torch.ones(2, 4, 4) > 0, torch.ones(0, 1, 4, 4) > 0]
)
def test_dense_masks_of_other_shapes_and_types_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"a dense mask \(.*\) of torch\.\w+: .*\(S, S\) or \(B, 1, S, S\)"):
        mask_from_dense(wrong)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Mask.window(-1, 0), r"window \(-1, 0\).* neither side is negative"),
        (lambda: Mask.documents([0, 5, 3]), r"cu_seqlens \(0, 5, 3\).* never decrease"),
        (lambda: Mask.documents([1, 5]), "start at 0"),
        (lambda: Mask.documents([0]), r"cu_seqlens \(0,\)"),
        (lambda: Mask.documents([]), r"cu_seqlens \(\)"),
        (lambda: Mask.documents([0, *range(9, 0, -1)]), r"cu_seqlens \(0, 9, 8, 7, 6, 5, \.\.\., 1\)"),
        (lambda: Mask.padded([0, 5, 3], [1, 1]), "never decrease"),
        (lambda: Mask.padded([0, 4, 9], [4]), "1 lengths for 2 documents"),
        (lambda: Mask.padded([0, 4, 9], [4, 6]), r"lengths\[1\] = 6 in a document of 5 tokens"),
        (lambda: Mask.padded([0, 4, 9], [-1, 5]), r"lengths\[0\] = -1 in a document of 4 tokens"),
        (lambda: Mask.prefix([0, 4], [5]), r"prefix_lengths\[0\] = 5 in a document of 4 tokens"),
        (lambda: Mask.prefix([0, 4], [-2]), r"prefix_lengths\[0\] = -2"),
        (lambda: Mask.prefix([2, 4], [1]), "start at 0"),
        (lambda: Mask.chunked(0), "a chunk size of 0: .*at least 1"),
        (lambda: Mask.sinks(-1), "sinks of -1: .*at least 0"),
        (lambda: Mask.global_tokens(-3), "global tokens of -3"),
        (lambda: Mask.shared_question([(2, -1)]), "a question or answer of -1"),
        (lambda: Mask.shared_question([(2,), ()]), "a group without lengths"),
        (lambda: Mask.runs([(1, 0, 2)]), r"runs of queries from \(1,\).*begins at query 0"),
        (lambda: Mask.runs([(0, 0, 2), (3, 0, 2), (3, 1, 2)]), r"from \(0, 3, 3\)"),
        (lambda: Mask.documents([0, 4]) & Mask.documents([0, 5]), "ending at 4 and at 5"),
        (lambda: Mask.documents([0, 4]) | Mask.documents([0, 5]), "ending at 4 and at 5"),
        (lambda: Mask.documents([0, 4]).check_length(5), "ending at 4 for 5 tokens.*Add the last border"),
        (lambda: Mask.parse("triangular"), "mask text 'triangular'"),
        (lambda: Mask.parse(""), "mask text ''"),
        (lambda: Mask.parse("causal&"), "mask text ''"),
        (lambda: Mask.parse("causal(3)"), r"mask text 'causal\(3\)'"),
        (lambda: Mask.parse("window(3)"), r"mask text 'window\(3\)'"),
        (lambda: Mask.parse("window(-3,0)"), r"mask text 'window\(-3,0\)'"),
        (lambda: Mask.parse("chunks(four)"), r"mask text 'chunks\(four\)'"),
        (lambda: Mask.parse("padded(0,4)"), r"mask text 'padded\(0,4\)'"),
        (lambda: Mask.parse("runs(0:1..q)"), r"mask text 'runs\(0:1\.\.q\)'"),
        (lambda: Mask.parse("documents(0,5,3)"), "never decrease"),
    ],
)
def test_bad_masks_are_refused(make, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=text):
        make()


def test_borders_are_integers() -> None:
    with pytest.raises(TypeError, match="float"):
        Mask.documents([0, 2.5, 4])  # type: ignore[list-item]
    assert Mask.documents(torch.tensor([0, 2, 4])) == Mask.documents([0, 2, 4])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Mask.chunked(4) & Mask.chunked(6), r"causal&chunks\(4\) & causal&chunks\(6\)"),
        (lambda: Mask.chunked(4) & Mask.sinks(2), "combine with windows and multiples"),
        (lambda: Mask.chunked(4) | Mask.sinks(2), "Give both masks a length first"),
        (lambda: Mask.window(3) | Mask.chunked(4), "without a sequence length"),
    ],
)
def test_chunks_of_no_given_length_refuse_what_they_cannot_express(make, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnsupportedError, match=text):
        make()


def test_chunks_combine_with_anything_over_a_given_length() -> None:
    chunks, sinks = Mask.chunked(4) & whole(10), Mask.sinks(2) & whole(10)
    assert (chunks | sinks).keys_of(9) == (range(2), range(8, 10))
    assert (chunks & (Mask.chunked(6) & whole(10))).cu_seqlens == (0, 4, 6, 8, 10)


BAD_LENGTHS = [
    Mask.documents((0, 5, 14)),
    Mask.documents((0, 5, 18)),
    Mask.padded((0, 5, 14), (5, 9)),
    Mask.prefix((0, 14), (3,)),
    Mask.runs([(0, 0, 3)], 14),
    Mask.chunked(4) & whole(14),
]


@pytest.mark.parametrize("method", ["lightseq", "all_gather", "ulysses", "rsa", "auto"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_mask_of_another_length_is_refused_before_anything_is_planned(method: str, size: int) -> None:
    def attend(group: Group) -> None:
        q = torch.randn(16 // size, 1, 4, 8)
        mls.dist_attention(q, q, q, group=group, mask=mask, method=method)

    for mask in BAD_LENGTHS:
        with pytest.raises(ConfigError, match=rf"a mask ending at {mask.length} for 16 tokens"):
            run_loopback(size, attend)
