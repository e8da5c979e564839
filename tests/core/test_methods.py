"""Methods and layouts are each defined in one table: an entry added there works everywhere."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from megatron_lightseq.attention import DistAttention
from megatron_lightseq.errors import ConfigError, LayoutError, UnsupportedError
from megatron_lightseq.layout import LAYOUTS, LayoutRule, SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import (
    METHODS,
    Chooser,
    Direction,
    Method,
    Network,
    Placement,
    Problem,
    TensorShape,
    Tile,
    build,
    compile_program,
    default_layouts,
    method_forms,
    method_names,
    register,
    resolve_method,
    simulate,
)
from megatron_lightseq.schedule.choose import candidates
from megatron_lightseq.transport import run_loopback
from tests.core import oracle
from tests.core.test_attention import attend, check_exact, unshard

NEW_METHOD = """
from megatron_lightseq.schedule import Method, Tile, register

def place_key_owner(problem):
    layout = problem.layout
    chunks = range(layout.num_chunks)
    return [[[Tile(q, k) for q in chunks for k in layout.chunks_of(rank)] for rank in range(layout.cp_size)]]

register(Method("key_owner", place_key_owner, summary="all queries against its own keys", default_layout="zigzag"))
"""


@pytest.fixture
def key_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Method]:
    """A method that a third-party module registers when it is imported."""
    (tmp_path / "a_new_method.py").write_text(NEW_METHOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(METHODS)
    try:
        importlib.import_module("a_new_method")
        yield METHODS["key_owner"]
    finally:
        sys.modules.pop("a_new_method", None)
        METHODS.clear()
        METHODS.update(before)


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_a_method_added_by_a_module_runs_by_its_name(key_owner: Method, layout_name: str) -> None:
    layout, mask = SequenceLayout(layout_name, 3), Mask.causal()
    whole = oracle.inputs(3 * 8, (4, 2), (8, 5), torch.float64)
    parts = run_loopback(3, lambda group: attend(group, "key_owner", layout, mask, whole))
    check_exact(unshard(layout, parts), whole, mask, layout_name)


def test_a_method_added_by_a_module_is_listed_everywhere(key_owner: Method) -> None:
    assert method_names()[-1] == "key_owner"
    assert "key_owner" in method_forms()
    assert resolve_method("key_owner") is key_owner
    assert "key_owner" in candidates(
        Problem(layout=SequenceLayout.striped(4), mask=Mask.causal(), seq_length=64)
    )
    with pytest.raises(
        UnsupportedError, match=r"the methods are .*key_owner.*The nearest name is 'key_owner'"
    ):
        resolve_method("key_ovner")


def test_a_name_is_given_once(key_owner: Method) -> None:
    assert register(key_owner) is key_owner
    with pytest.raises(
        ConfigError, match=r"a method named 'key_owner': .*not taken yet; taken are lightseq, "
    ):
        register(Method("key_owner", METHODS["ring"].place))
    with pytest.raises(ConfigError, match="a method named 'key:owner'"):
        register(Method("key:owner", METHODS["ring"].place))


def test_every_method_is_described() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert method.source
        assert method.default_layout in method.layouts
        assert method.layouts[0] == method.default_layout
        for form in method.sized:
            assert f"{name}:{form.text}" in method_forms()
    assert default_layouts() == ("contiguous", "zigzag")


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_the_layouts_of_a_method_are_those_it_can_compute_on(method: str, layout_name: str) -> None:
    """Accepted layouts give correct results (tests/core/test_attention.py). Refused ones would lose tiles or, for
    ``zigzag``, be the ring method under another name.
    """
    layout, found = SequenceLayout(layout_name, 4), METHODS[method]
    if layout_name in found.layouts:
        assert build(method, layout).steps
        return
    with pytest.raises(UnsupportedError, match=f"{method} works on {' or '.join(found.layouts)} shards"):
        build(method, layout)
    only = {"lightseq": ("contiguous",), "balanced": ("contiguous", "dealt"), "zigzag": ("zigzag",)}
    assert found.layouts == only[method]


@pytest.mark.parametrize("method", METHODS)
def test_default_layouts_balance_all_but_the_baselines(method: str) -> None:
    layout = SequenceLayout(METHODS[method].default_layout, 8)
    assert (simulate(build(method, layout)).busy > 0.99) == (method not in ("ring", "rsa"))


@pytest.mark.parametrize("text", ["", "4", "4x", "4x2x1", "04x2", "-4x2", "4 x 2", "axb"])
def test_sizes_in_another_form_are_refused(text: str) -> None:
    assert resolve_method("mesh:4x2").name == "mesh:4x2"
    with pytest.raises(UnsupportedError, match="mesh:ROWSxCOLUMNS"):
        resolve_method(f"mesh:{text}")
    with pytest.raises(UnsupportedError, match=r"method 'ring:4x2'"):
        resolve_method("ring:4x2")


# --- layouts ---------------------------------------------------------------------------------------------------

NEW_LAYOUTS = {
    # The later piece is stored first, so that storage order and sequence order differ.
    "late_first": LayoutRule(lambda rank, cp_size: (2 * cp_size - 1 - rank, rank)),
    # Two stripes per rank: several interleaved pieces.
    "two_stripes": LayoutRule(lambda rank, cp_size: (rank, 2 * cp_size - 1 - rank), interleaved=True),
    # Three pieces per rank, none of them adjacent.
    "handed_out": LayoutRule(lambda rank, cp_size: (rank, cp_size + rank, 2 * cp_size + rank)),
    # Adjacent ranks share no early or late half, so that ranks cannot exchange heads in groups.
    "shifted": LayoutRule(lambda rank, cp_size: (rank, cp_size + (rank + 1) % cp_size)),
}


@pytest.fixture(params=NEW_LAYOUTS)
def new_layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(LAYOUTS, request.param, NEW_LAYOUTS[request.param])
    return request.param


def test_a_layout_is_one_entry(new_layout: str) -> None:
    """Positions, shards, text and lengths follow from its pieces."""
    layout = SequenceLayout(new_layout, 4)
    seq_length = 4 * len(layout.chunks_of(0)) * 2
    held = [layout.positions(rank, seq_length) for rank in range(4)]
    assert sorted(chain(*held)) == list(range(seq_length))
    x = torch.arange(seq_length)
    parts = [layout.shard(x, rank, 0) for rank in range(4)]
    assert [part.tolist() for part in parts] == held
    assert torch.equal(layout.unshard(parts, 0), x)
    assert SequenceLayout.parse(str(layout.split(3))) == layout.split(3)
    with pytest.raises(LayoutError, match=f"the {new_layout} layout needs a multiple of [23] x cp_size"):
        layout.check_length(seq_length + 4)


def test_groups_of_a_new_layout_hold_their_members_shards(new_layout: str) -> None:
    layout, size, per_rank = SequenceLayout(new_layout, 6), 3, 12
    merged = layout.merged(size)
    if new_layout == "shifted":  # a group would hold parts of ranks
        with pytest.raises(LayoutError, match=r"1 ranks of shifted\(6\) inside group 0 of shifted\(2\)"):
            layout.members(0, size)
        return
    for group in range(merged.cp_size):
        shard: list[int | None] = [None] * (per_rank * size)
        for rank in layout.members(group, size):
            positions = layout.positions(rank, per_rank * 6)
            for there, here in layout.landing(rank, size, per_rank):
                shard[here] = positions[there]
        assert shard == merged.positions(group, per_rank * 6)


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].only_layouts])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_methods_run_on_a_new_layout(new_layout: str, method: str, size: int) -> None:
    layout, mask = SequenceLayout(new_layout, size), Mask.causal()
    if new_layout == "shifted" and METHODS[method].ulysses_size(size) not in (1, size):
        with pytest.raises(LayoutError, match="inside group 0"):
            run_loopback(
                size,
                lambda group: DistAttention(group, layout=layout, method=method)(*torch.ones(3, 2, 1, 1, 4)),
            )
        return
    assert new_layout in METHODS[method].layouts
    whole = oracle.inputs(12 * size, (4, 2), (8, 5), torch.float64)
    parts = run_loopback(size, lambda group: attend(group, method, layout, mask, whole))
    check_exact(unshard(layout, parts), whole, mask, method)


def test_rotary_angles_follow_a_new_layout(new_layout: str) -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from megatron_lightseq.megatron.cpu import platform
    from megatron_lightseq.megatron.rope import LayoutRotaryEmbedding

    platform.activate()
    rotary, layout = RotaryEmbedding(8, 1.0), SequenceLayout(new_layout, 2)
    angles = rotary(24, packed_seq=True)
    parts = [LayoutRotaryEmbedding(rotary, layout, rank)(24) for rank in range(2)]
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part, angles[layout.positions(rank, 24)])
    torch.testing.assert_close(layout.unshard(parts, 0), angles)


@pytest.mark.parametrize(
    "pieces_of",
    [lambda rank, cp_size: (0,), lambda rank, cp_size: (rank + 1,), lambda rank, cp_size: (0,) * rank],
)
def test_pieces_that_lose_tokens_are_refused(pieces_of, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(LAYOUTS, "broken", LayoutRule(pieces_of))
    with pytest.raises(LayoutError, match=r"pieces .* of 3 ranks: every rank holds equally many"):
        SequenceLayout("broken", 3)


# --- problems --------------------------------------------------------------------------------------------------

HEADS, CLUSTER = TensorShape(num_heads=8, num_query_groups=2), Network.parse("nvlink+8x400gbps")


def seen_by(method: Method, direction: str = "forward") -> Problem:
    """The problem that a method's placement receives on 8 ranks."""
    seen = []

    def place(problem: Problem) -> Placement:
        seen.append(problem)
        return method.place(problem)

    layout = SequenceLayout.contiguous(8)
    build(
        replace(method, place=place),
        layout,
        direction=direction,
        seq_length=256,
        shape=HEADS,
        network=CLUSTER,
    )
    return seen[0]


@pytest.mark.parametrize("direction", Direction)
def test_a_placement_sees_its_problem(direction: Direction) -> None:
    problem = seen_by(replace(METHODS["lightseq"], uses_shape=True), direction)
    assert problem == Problem(
        layout=SequenceLayout.contiguous(8).split(2),
        mask=Mask.causal(),
        seq_length=256,
        direction=direction,
        shape=HEADS,
        network=CLUSTER,
    )
    assert sum(problem.work.values()) == 256 * 257 // 2
    assert problem.work[Tile(0, 0)] == 16 * 17 // 2
    assert Tile(0, 1) not in problem.work


def test_a_placement_that_does_not_use_the_shape_does_not_see_it() -> None:
    """Then one schedule serves every shape and cannot depend on one."""
    problem = seen_by(METHODS["lightseq"])
    assert problem.shape == TensorShape()
    assert problem.network is None


def test_within_groups_that_exchange_heads_a_placement_sees_its_share() -> None:
    problem = seen_by(replace(resolve_method("usp:4"), uses_shape=True))
    assert problem.layout == SequenceLayout.contiguous(2).split(2)
    assert (problem.shape.num_heads, problem.shape.num_query_groups) == (2, 1)
    assert problem.network == CLUSTER.of_one_ring(4)


def test_work_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Placing, dropping empty tiles, checking and compiling share the result, in both directions."""
    calls: list[tuple[range, range]] = []
    area = Mask.area
    monkeypatch.setattr(Mask, "area", lambda mask, *tile: calls.append(tile) or area(mask, *tile))
    documents = Mask.documents((0, 5, 64))
    for direction in Direction:
        built = build("lightseq", SequenceLayout.contiguous(4), mask=documents, direction=direction)
        compile_program(built, 0)
    assert len(calls) == len(set(calls)) <= 8 * 8 + 1


def place_by_load(problem: Problem) -> Placement:
    """A small solver: a tile goes to the rank with the least work, preferably the owner of its more expensive side."""
    layout, owner = problem.layout, problem.layout.owner
    q_bytes, k_bytes = problem.shape.bytes_per_side(problem.direction)
    load = [0] * layout.cp_size
    placed: list[list[Tile]] = [[] for _ in load]
    for tile, area in sorted(problem.work.items(), key=lambda item: -item[1]):
        home = owner[tile.q] if q_bytes >= k_bytes else owner[tile.k]
        rank = min(range(layout.cp_size), key=lambda r: (load[r], r != home))
        load[rank] += area
        placed[rank].append(tile)
    return [placed]


BY_LOAD = Method(
    "by_load",
    place_by_load,
    splits=lambda problem: 4 if problem.direction is Direction.FORWARD else 2,
    uses_shape=True,
)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_solver_plans_each_direction_for_packed_documents(size: int) -> None:
    layout, mask = SequenceLayout.contiguous(size), Mask.documents((0, 3, 4 * size, 11 * size, 12 * size))
    built = {
        way: build(BY_LOAD, layout, mask=mask, direction=way, shape=TensorShape(num_heads=4))
        for way in Direction
    }
    assert [one.layout.splits for one in built.values()] == [4, 2]
    whole = oracle.inputs(12 * size, (4, 1), (8, 5), torch.float64)
    parts = run_loopback(size, lambda group: attend(group, BY_LOAD, layout, mask, whole))
    check_exact(unshard(layout, parts), whole, mask, size)


def test_predictions_of_a_solver_depend_on_the_shape() -> None:
    """Schedules are cached by what the placement sees: another shape gives another schedule if the method uses it."""
    sizes = []

    def place(problem: Problem) -> Placement:
        sizes.append(problem.shape.num_heads)
        return METHODS["ring"].place(problem)

    chooser, network = Chooser(4, 64), Network.parse("nvlink")
    for uses_shape, expected in ((False, [1]), (True, [4, 8])):
        sizes.clear()
        method = Method("watched", place, uses_shape=uses_shape)
        for heads in (4, 8, 8):
            chooser.predict(method, "contiguous", Direction.FORWARD, TensorShape(num_heads=heads), network)
        assert sizes == expected
