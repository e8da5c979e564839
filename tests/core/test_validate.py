"""One mutant for every check of ``find_fault``: a schedule that breaks exactly this rule, and the expected message."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_lightseq.errors import ScheduleError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Direction, Move, Payload, Schedule, Step, Tile
from megatron_lightseq.schedule.problem import areas_of
from megatron_lightseq.schedule.validate import find_fault

LAYOUT = SequenceLayout.contiguous(2)
AREAS = areas_of(LAYOUT, Mask.full(), 4)
Q0, KV0, KV1 = Move(Payload.Q, 0, 0, 1), Move(Payload.KV, 0, 0, 1), Move(Payload.KV, 1, 1, 0)
OUT0 = Move(Payload.OUT, 0, 1, 0)


def step(rank_0: str, rank_1: str, *moves: Move) -> Step:
    """A step of two ranks, with tiles written as in the text form of schedules."""
    tiles = (tuple(Tile(int(t[1]), int(t[3])) for t in cell.split()) for cell in (rank_0, rank_1))
    return Step(tuple(tiles), moves)


def valid() -> list[Step]:
    """A valid schedule: rank 1 computes the tile of rank 0's queries that rank 0 does not."""
    return [
        step("", "q1k1", Q0, KV0),
        step("q0k0", "q1k0 q0k1"),
        step("", "", OUT0),
    ]


def fault(steps: list[Step], direction: Direction = Direction.FORWARD) -> str:
    return str(find_fault(steps, direction=direction, layout=LAYOUT, areas=AREAS))


def replaced(at: int, changed: Step) -> Callable[[], list[Step]]:
    def mutant() -> list[Step]:
        steps = valid()
        steps[at] = changed
        return steps

    return mutant


def added(*more: Step) -> Callable[[], list[Step]]:
    return lambda: [*valid(), *more]


def test_the_schedule_that_is_mutated_is_valid() -> None:
    assert find_fault(valid(), direction=Direction.FORWARD, layout=LAYOUT, areas=AREAS) is None


@pytest.mark.parametrize(
    ("mutant", "text"),
    [
        (
            replaced(1, step("q0k0 q0k5", "q1k0 q0k1")),
            "step 1: rank 0 computes q0k5, which is not in the sequence",
        ),
        (
            replaced(1, step("q0k0 q0k1", "q1k0 q0k1", KV1)),
            "step 1: rank 0 computes q0k1 but kv1 has not arrived",
        ),
        (replaced(0, step("", "q1k1 q1k0", Q0, KV0)), "step 0: rank 1 computes q1k0 but kv0 has not arrived"),
        (
            replaced(1, step("q0k0", "q1k0 q0k1 q1k0")),
            "step 1: q1k0 is computed twice, the second time by rank 1",
        ),
        (
            lambda: [*valid()[:1], step("", "q1k0 q0k1"), step("", "", OUT0), step("", "q0k0")],
            "step 3: rank 1 adds to out0 after having sent it",
        ),
        (
            replaced(1, step("q0k0", "q1k0 q0k1", OUT0)),
            "step 1: out0:1>0: rank 1 has not finished such a result",
        ),
        (replaced(2, step("", "", OUT0, OUT0)), "step 2: out0:1>0 is sent twice"),
        (replaced(0, step("", "q1k1", Q0, KV0, KV0)), "step 0: kv0:0>1 is sent twice"),
        (replaced(2, step("", "", Move(Payload.DQ, 0, 1, 0))), "step 2: dq0:1>0 is not a forward move"),
        (
            replaced(0, step("", "q1k1", Q0, KV0, Move(Payload.KV, 1, 0, 1))),
            "step 0: kv1:0>1: rank 1 owns chunk 1",
        ),
        (
            replaced(2, step("", "", Move(Payload.OUT, 0, 0, 1))),
            "step 2: out0:0>1: rank 1 does not own chunk 0",
        ),
        (
            replaced(0, step("", "q1k1", Q0, KV0, Move(Payload.KV, 2, 0, 1))),
            "step 0: kv2:0>1: chunk 2 is not in the sequence",
        ),
        (
            replaced(0, step("", "q1k1", Q0, KV0, Move(Payload.KV, -1, 1, 0))),
            "step 0: kv-1:1>0: chunk -1 is not in the sequence",
        ),
        (
            replaced(0, step("", "q1k1", Q0, KV0, Move(Payload.KV, 0, 0, 0))),
            "step 0: kv0:0>0: a rank sends to itself",
        ),
        (replaced(1, Step(((Tile(0, 0),),))), "step 1: tiles of 1 ranks, the layout has 2"),
        (replaced(1, step("q0k0", "q0k1")), "step 2: never computed: q1k0"),
        (replaced(2, step("", "")), "step 2: out0 is never sent by rank 1"),
        (added(step("", "", KV1)), "step 3: kv1 is sent to rank 0, which never uses it"),
    ],
)
def test_every_check_has_a_mutant(mutant: Callable[[], list[Step]], text: str) -> None:
    assert fault(mutant()) == text


def test_backward_results_of_both_sides_are_checked() -> None:
    qdo0, dq0, dkv0 = Move(Payload.QDO, 0, 0, 1), Move(Payload.DQ, 0, 1, 0), Move(Payload.DKV, 0, 1, 0)
    steps = [step("", "q1k1", qdo0, KV0), step("q0k0", "q1k0 q0k1"), step("", "", dq0, dkv0)]
    assert fault(steps, Direction.BACKWARD) == "None"
    for left, missing in ((dq0, "dkv0"), (dkv0, "dq0")):
        steps[2] = step("", "", left)
        assert fault(steps, Direction.BACKWARD) == f"step 2: {missing} is never sent by rank 1"


# --- rectangles of chunks, and inputs that are forwarded -------------------------------------------------------


def fault_in(layout: SequenceLayout, *steps: tuple[str, str], mask: Mask | None = None) -> str:
    """The first fault of steps written as in the text form of schedules: tiles by rank, moves."""
    mask = Mask.full() if mask is None else mask
    header = f"x forward {layout} {mask} {24 * layout.cp_size} tokens"
    lines = [f"step {t} | {tiles} | {moves}" for t, (tiles, moves) in enumerate(steps)]
    with pytest.raises(ScheduleError) as refused:
        Schedule.parse("\n".join([header, *(line.rstrip() for line in lines)]))
    return str(refused.value).splitlines()[0]


PAIR, THREE = SequenceLayout.contiguous(2).split(2), SequenceLayout.contiguous(3)


@pytest.mark.parametrize(
    ("layout", "steps", "text"),
    [
        (PAIR, [("q0-2k0 -", "")], "step 0: rank 0 computes q0-2k0, whose chunks belong to several ranks"),
        (PAIR, [("q0-1k0-1+q1k1 -", "")], "step 0: q1k1 is computed twice, the second time by rank 0"),
        (PAIR, [("q1k1+q0-1k0-1 -", "")], "step 0: q0-1k0-1 is computed twice, the second time by rank 0"),
        (
            PAIR,
            [("- -", "kv2:1>0"), ("q0k2-3 -", "")],
            "step 1: rank 0 computes q0k2-3 but kv3 has not arrived",
        ),
        (PAIR, [("- -", "kv2-3:1>0 kv3:1>0")], "step 0: kv3:1>0 is sent twice"),
        (PAIR, [("- -", "kv1-2:0>1")], "step 0: kv1-2:0>1: rank 1 owns chunk 1-2"),
        (PAIR, [("- -", "kv3-4:1>0")], "step 0: kv3-4:1>0: chunk 3-4 is not in the sequence"),
        (
            PAIR,
            [("q0-1k0-1 q2-3k2-3", "")],
            "step 0: never computed: q0k2 q0k3 q1k2 q1k3 q2k0 q2k1 q3k0 q3k1",
        ),
        (
            THREE,
            [("- - -", "kv0:0>1 kv0:1>2")],
            "step 0: kv0:1>2: rank 1 neither owns chunk 0 nor has received it in one move",
        ),
        (
            THREE.split(2),
            [("- - -", "kv0:0>1 kv1:0>1"), ("- - -", "kv0-1:1>2")],
            "step 1: kv0-1:1>2: rank 1 neither owns chunk 0-1 nor has received it in one move",
        ),
        (THREE, [("- - -", "kv0:0>1"), ("- - -", "kv0:1>0")], "step 1: kv0:1>0: rank 0 owns chunk 0"),
        (
            SequenceLayout.contiguous(12).split(24),
            [(" ".join(["q0-23k0-23", *["-"] * 11]), "")],
            "step 0: 82368 of 82944 pairs are never computed",
        ),
    ],
)
def test_every_check_of_rectangles_and_relays_has_a_mutant(
    layout: SequenceLayout, steps: list[tuple[str, str]], text: str
) -> None:
    assert fault_in(layout, *steps) == text


def test_a_forwarded_input_must_be_used() -> None:
    """It is used by the rank that forwards it, and must be used by the last rank that receives it."""
    causal = Mask.documents((0, 24, 48, 72))  # every rank has its own document: no input is needed
    steps = [("q0k0 q1k1 q2k2", "kv0:0>1"), ("- - -", "kv0:1>2")]
    assert fault_in(THREE, *steps, mask=causal) == "step 1: kv0 is sent to rank 2, which never uses it"
    assert fault_in(THREE, *steps[:1], mask=causal) == "step 0: kv0 is sent to rank 1, which never uses it"


def test_a_tile_without_work_is_refused() -> None:
    found = fault_in(THREE, ("q0k0+q0k1 - -", ""), mask=Mask.causal())
    assert found == "step 0: rank 0 computes q0k1, which holds no work"
