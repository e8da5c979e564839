from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_lightseq import schedule as schedules
from megatron_lightseq.errors import LayoutError, ScheduleError, UnsupportedError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import (
    Costs,
    Method,
    Network,
    Placement,
    Problem,
    Schedule,
    TensorShape,
    Tile,
    compile_program,
    simulate,
)
from megatron_lightseq.schedule.ir import RESULTS, Payload, Step
from megatron_lightseq.schedule.place import all_tiles
from megatron_lightseq.schedule.program import OWN

CASES = [
    ("lightseq", "contiguous"),
    ("ring", "contiguous"),
    ("ring", "striped"),
    ("zigzag", "zigzag"),
    ("all_gather", "zigzag"),
    ("mesh", "zigzag"),
    ("mesh", "striped"),
]
DIRECTIONS = ["forward", "backward"]


def build(method: str, layout: str, size: int, direction: str = "forward", **kwargs) -> Schedule:  # type: ignore[no-untyped-def]
    return schedules.build(method, SequenceLayout(layout, size), direction=direction, **kwargs)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("method", "layout"), CASES)
def test_every_size_is_valid_and_round_trips(method: str, layout: str, direction: str) -> None:
    for size in range(1, 18):
        schedule = build(method, layout, size, direction)  # validates at construction
        assert Schedule.parse(str(schedule)) == schedule
        assert Schedule.parse(str(schedule)).fingerprint == schedule.fingerprint


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (" forward ", " sideways ", "schedule header"),
        ("step 1", "step 7", "step 1 is written"),
        ("kv0:0>1", "xx0:0>1", "schedule line"),
        ("kv0:0>1", "kv0:0>1 junk", "schedule line"),
        ("q0k0", "q0k0-", "schedule line"),
        ("q0k0", "q0k0 | -", "schedule line"),
        ("kv0:0>1", "", "has not arrived"),
    ],
)
def test_text_that_says_something_else_is_refused(old: str, new: str, text: str) -> None:
    schedule = str(build("ring", "contiguous", 2))
    assert old in schedule
    with pytest.raises(ScheduleError, match=text):
        Schedule.parse(schedule.replace(old, new))
    with pytest.raises(ScheduleError, match="schedule header ''"):
        Schedule.parse("")


@pytest.mark.parametrize("size", range(1, 18))
def test_lightseq_makespan_is_half_of_the_ranks(size: int) -> None:
    """P/2 chunk tiles for every P, odd or even: the causal triangle is divided without idle time."""
    result = simulate(build("lightseq", "contiguous", size))
    assert result.makespan_s == pytest.approx(size / 2, rel=2e-3)
    assert result.busy == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("size", [96, 127, 128, 255, 256])
def test_lightseq_stays_balanced_on_many_ranks(size: int) -> None:
    assert simulate(build("lightseq", "contiguous", size)).busy >= 0.98


@pytest.mark.parametrize(("size", "at_most"), [(16, 0.7), (64, 0.4), (256, 0.2)])
def test_mesh_receives_far_fewer_bytes_and_stays_balanced(size: int, at_most: float) -> None:
    """Compares the busiest rank (MHA, forward) with the best of the methods whose volume grows with P."""
    shape = TensorShape(num_heads=32, num_query_groups=32)

    def received(method: str, layout: str) -> int:
        return max(simulate(build(method, layout, size), shape=shape).bytes_received)

    mesh = simulate(build("mesh", "zigzag", size), shape=shape)
    others = [("lightseq", "contiguous"), ("zigzag", "zigzag"), ("all_gather", "zigzag")]
    assert max(mesh.bytes_received) <= at_most * min(received(*other) for other in others)
    assert mesh.busy >= 0.95


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_mesh_of_every_shape_is_valid(direction: str) -> None:
    for size in range(1, 13):
        for rows in (rows for rows in range(1, size + 1) if size % rows == 0):
            schedule = build(f"mesh:{rows}x{size // rows}", "zigzag", size, direction)
            inputs = [m for step in schedule.steps for m in step.moves if m.payload not in RESULTS]
            # 2 chunks per rank, from every other rank of the row and the column; nothing is sent without work
            assert len(inputs) <= 2 * size * (rows - 1 + size // rows - 1)


def test_all_gather_transfers_in_one_step() -> None:
    schedule = build("all_gather", "zigzag", 8)
    assert [bool(step.moves) for step in schedule.steps] == [True, False, False]


def test_usp_places_on_the_ranks_between_the_groups() -> None:
    assert build("usp:2", "contiguous", 8).steps == build("lightseq", "contiguous", 4).steps
    assert build("usp", "zigzag", 12).layout.cp_size == 4
    assert build("ulysses", "zigzag", 8).layout.cp_size == 1


def test_contiguous_ring_is_the_unbalanced_ablation() -> None:
    assert simulate(build("ring", "contiguous", 8)).busy == pytest.approx(8 / 15, rel=1e-3)
    assert simulate(build("zigzag", "zigzag", 8)).busy == pytest.approx(1.0, abs=2e-3)


def test_lightseq_bytes_are_those_of_the_paper() -> None:
    """At P = 8, MHA, a rank sends 7 chunk tensors on average and the busiest 11, before the last step is split."""
    shape = TensorShape(num_heads=1, num_query_groups=1, head_dim=1, element_bytes=4)
    schedule = build("lightseq", "contiguous", 8)
    shard = schedule.seq_length // 8
    sent = [0.0] * 8
    for step in schedule.steps:
        for move in step.moves:
            length = len(schedule.layout.chunk_positions(move.chunk, schedule.seq_length))
            statistics = (
                4 * length if move.payload is Payload.OUT else 0
            )  # lse, not counted in the paper's units
            sent[move.src] += length * shape.bytes_per_token(move.payload) - statistics
    tensors = [total / (4 * shard) for total in sent]
    # The split of the last step adds half a query and half an output chunk for each of its 4 helpers.
    assert sum(tensors) / 8 == pytest.approx(7 + 4 * (0.5 + 0.5) / 8)


def mutants(schedule: Schedule) -> Iterator[tuple[str, tuple[Step, ...]]]:
    """Every schedule that differs by one tile or one move dropped, repeated, delayed or sent elsewhere."""
    size = schedule.layout.cp_size
    for t, step in enumerate(schedule.steps):

        def with_step(changed: Step, t: int = t) -> tuple[Step, ...]:
            return (*schedule.steps[:t], changed, *schedule.steps[t + 1 :])

        for i, move in enumerate(step.moves):
            rest = step.moves[:i] + step.moves[i + 1 :]
            yield f"drop {move} at {t}", with_step(replace(step, moves=rest))
            yield f"repeat {move} at {t}", with_step(replace(step, moves=(*step.moves, move)))
            elsewhere = move._replace(dst=(move.dst + 1) % size)
            yield f"redirect {move} at {t}", with_step(replace(step, moves=(*rest, elsewhere)))
            other_chunk = move._replace(chunk=(move.chunk + 1) % schedule.layout.num_chunks)
            if other_chunk not in step.moves:
                yield f"exchange {move} at {t}", with_step(replace(step, moves=(*rest, other_chunk)))
            if t + 1 < len(schedule.steps) and move.payload not in RESULTS:
                late = replace(schedule.steps[t + 1], moves=(*schedule.steps[t + 1].moves, move))
                yield (
                    f"delay {move} at {t}",
                    (*schedule.steps[:t], replace(step, moves=rest), late, *schedule.steps[t + 2 :]),
                )
        for rank, tiles in enumerate(step.tiles):
            for i, tile in enumerate(tiles):
                fewer = (*step.tiles[:rank], tiles[:i] + tiles[i + 1 :], *step.tiles[rank + 1 :])
                more = (*step.tiles[:rank], (*tiles, tile), *step.tiles[rank + 1 :])
                yield f"drop {tile} of rank {rank} at {t}", with_step(replace(step, tiles=fewer))
                yield f"repeat {tile} of rank {rank} at {t}", with_step(replace(step, tiles=more))


def accept(schedule: Schedule, steps: tuple[Step, ...], what: str) -> None:
    replace(schedule, steps=steps)
    pytest.fail(f"accepted: {what}")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("method", "layout"), CASES)
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_mutant_is_refused(method: str, layout: str, size: int, direction: str) -> None:
    schedule = build(method, layout, size, direction)
    count = 0
    for what, steps in mutants(schedule):
        count += 1
        with pytest.raises(ScheduleError, match="<-- here"):
            accept(schedule, steps, what)
    assert count > 10


def test_tiles_without_work_are_refused_and_dropped() -> None:
    layout = SequenceLayout.contiguous(2)
    eager = Method("eager", lambda problem: [[[Tile(0, 0)], [Tile(1, 0), Tile(1, 1)]], [[Tile(0, 1)], []]])
    schedule = schedules.build(eager, layout)
    assert all(Tile(0, 1) not in tiles for step in schedule.steps for tiles in step.tiles)
    with pytest.raises(ScheduleError, match="q0k1, which holds no work"):
        replace(schedule, steps=(*schedule.steps, Step(((Tile(0, 1),), ()))))


def test_a_window_drops_distant_tiles_and_their_transfers() -> None:
    schedule = build("ring", "contiguous", 8, mask=Mask.window(100), seq_length=8 * 128)
    assert {(tile.q - tile.k) for step in schedule.steps for tiles in step.tiles for tile in tiles} == {0, 1}
    assert sum(len(step.moves) for step in schedule.steps) == 7  # one neighbour each


def test_an_input_used_twice_travels_once_and_is_kept() -> None:
    """A placement may keep an input over several steps: it arrives before the first and is freed after the last."""
    layout = SequenceLayout.contiguous(2)

    def stretched(problem: Problem) -> Placement:
        layout = problem.layout
        own = [all_tiles(layout, rank, rank) for rank in (0, 1)]
        other = [all_tiles(layout, rank, 1 - rank) for rank in (0, 1)]
        halves = [[[tile for tile in tiles if tile.q % 2 == half] for tiles in other] for half in (0, 1)]
        return [own, *halves]

    for direction in DIRECTIONS:
        schedule = schedules.build(
            Method("stretched", stretched, splits=2), layout, mask=Mask.full(), direction=direction
        )
        moves = [move for step in schedule.steps for move in step.moves]
        assert len(moves) == len(set(moves))
        program = compile_program(schedule, 0)
        reads = [
            t for t, step in enumerate(program.steps) if any(call.k.store is not OWN for call in step.calls)
        ]
        frees = [t for t, step in enumerate(program.steps) if step.last_uses]
        assert len(reads) == 2
        assert frees == [reads[-1]]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("method", "layout"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_programs_cover_the_schedule_and_agree_on_transfers(
    method: str, layout: str, size: int, direction: str
) -> None:
    schedule = build(method, layout, size, direction)
    programs = [compile_program(schedule, rank) for rank in range(size)]
    areas = [sum(call.area for step in program.steps for call in step.calls) for program in programs]
    assert sum(areas) == sum(schedule.work.values())
    for t in range(len(schedule.steps)):
        sent = {
            (s.tag, s.payload, s.span, r, s.peer) for r, p in enumerate(programs) for s in p.steps[t].sends
        }
        got = {
            (s.tag, s.payload, s.span, s.peer, r) for r, p in enumerate(programs) for s in p.steps[t].receives
        }
        assert sent == got
        assert len({tag for tag, *_ in sent}) == len(sent)


def test_adjacent_chunks_become_one_call_and_one_message() -> None:
    program = compile_program(build("lightseq", "contiguous", 4), 3)
    assert [len(step.calls) for step in program.steps] == [1, 1, 1, 2]
    assert [len(step.receives) for step in program.steps] == [1, 1, 1, 1]
    assert len(compile_program(build("lightseq", "contiguous", 1), 0).steps[0].calls) == 1


@pytest.mark.parametrize(
    ("method", "layout", "size", "merging"),
    [
        ("lightseq", "contiguous", 1, []),
        ("ring", "zigzag", 1, []),
        ("all_gather", "contiguous", 3, [1, 2]),  # its own keys first, then those of others
        ("lightseq", "contiguous", 2, [0, 1]),  # rank 0 helps
        ("ring", "zigzag", 2, [0, 1]),
    ],
)
def test_programs_know_whether_results_are_merged(
    method: str, layout: str, size: int, merging: list[int]
) -> None:
    schedule = build(method, layout, size)
    assert [rank for rank in range(size) if compile_program(schedule, rank).merges] == merging


def test_overlap_and_bandwidth_in_the_simulation() -> None:
    schedule = build("lightseq", "contiguous", 4)
    free = simulate(schedule)
    slow = Network(name="slow", link_bytes_per_s=1e6, link_latency_s=1e-3)
    during, after = (simulate(schedule, Costs(overlap=overlap, network=slow)) for overlap in (True, False))
    assert free.exposed_s == 0.0
    assert free.makespan_s < during.makespan_s < after.makespan_s
    assert during.bytes_sent == after.bytes_sent
    assert sum(during.bytes_sent) == sum(during.bytes_received)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: build("mesh:2x2", "zigzag", 6), UnsupportedError, "a mesh of 2 x 2 for 6 ranks"),
        (lambda: build("mesh:0x2", "zigzag", 2), UnsupportedError, "The nearest name is 'mesh'"),
        (lambda: build("usp:3", "contiguous", 4), LayoutError, "groups of 3 among 4 context-parallel ranks"),
        (lambda: build("lightsec", "contiguous", 2), UnsupportedError, "The nearest name is 'lightseq'"),
        (lambda: build("lightseq", "zigzag", 2), UnsupportedError, "'lightseq' on the zigzag layout"),
        (lambda: build("zigzag", "contiguous", 2), UnsupportedError, "works on zigzag shards"),
        (lambda: build("ring", "contiguous", 3, seq_length=10), LayoutError, "seq_length 10 over cp_size 3"),
        (lambda: Schedule.parse("nonsense"), ScheduleError, "schedule header 'nonsense'"),
        (
            lambda: Schedule.parse(str(build("ring", "contiguous", 2)).replace("|", "!")),
            ScheduleError,
            "schedule line",
        ),
        (
            lambda: schedules.build(Method("idle", lambda problem: []), SequenceLayout.contiguous(2)),
            ScheduleError,
            "never computed: q0k0 q1k0 q1k1",
        ),
    ],
)
def test_bad_requests_are_refused(make, error: type[Exception], text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        make()
