"""One mutant for every check of ``find_fault``: a schedule that breaks exactly this rule, and the words for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_lightseq.schedule import Direction, Move, Payload, Step, Tile
from megatron_lightseq.schedule.validate import find_fault

OWNER = (0, 1)
WORK = {Tile(q, k): 4 for q in (0, 1) for k in (0, 1)}
Q0, KV0, KV1 = Move(Payload.Q, 0, 0, 1), Move(Payload.KV, 0, 0, 1), Move(Payload.KV, 1, 1, 0)
OUT0 = Move(Payload.OUT, 0, 1, 0)


def step(rank_0: str, rank_1: str, *moves: Move) -> Step:
    """A step of two ranks, with tiles written as in the text form of schedules."""
    tiles = (tuple(Tile(int(t[1]), int(t[3])) for t in cell.split()) for cell in (rank_0, rank_1))
    return Step(tuple(tiles), moves)


def valid() -> list[Step]:
    """Rank 1 computes both tiles of rank 0's queries that rank 0 does not."""
    return [
        step("", "q1k1", Q0, KV0),
        step("q0k0", "q1k0 q0k1"),
        step("", "", OUT0),
    ]


def fault(steps: list[Step], direction: Direction = Direction.FORWARD) -> str:
    return str(find_fault(steps, direction=direction, owner=OWNER, work=WORK))


def replaced(at: int, changed: Step) -> Callable[[], list[Step]]:
    def mutant() -> list[Step]:
        steps = valid()
        steps[at] = changed
        return steps

    return mutant


def added(*more: Step) -> Callable[[], list[Step]]:
    return lambda: [*valid(), *more]


def test_the_schedule_that_is_mutated_is_valid() -> None:
    assert find_fault(valid(), direction=Direction.FORWARD, owner=OWNER, work=WORK) is None


@pytest.mark.parametrize(
    ("mutant", "text"),
    [
        (replaced(1, step("q0k0 q0k5", "q1k0 q0k1")), "step 1: rank 0 computes q0k5, which holds no work"),
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
            "step 0: kv1:0>1: rank 0 does not own chunk 1",
        ),
        (
            replaced(2, step("", "", Move(Payload.OUT, 0, 0, 1))),
            "step 2: out0:0>1: rank 1 does not own chunk 0",
        ),
        (
            replaced(0, step("", "q1k1", Q0, KV0, Move(Payload.KV, 2, 0, 1))),
            "step 0: kv2:0>1: rank 0 does not own chunk 2",
        ),
        (
            replaced(0, step("", "q1k1", Q0, KV0, Move(Payload.KV, -1, 1, 0))),
            "step 0: kv-1:1>0: rank 1 does not own chunk -1",
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
