"""What can go wrong, and exactly where: a fault plan has one fault for each attempt of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

VARIABLE = "LIGHTSEQ_TEST_CHAOS"
"""Path of a plan, for :mod:`tests.chaos.rank`."""

KILL, EXIT, RAISE, STOP, HANG, GIL, SLOW, DISK, FLIP = (
    "kill",
    "exit",
    "raise",
    "stop",
    "hang",
    "gil",
    "slow",
    "disk",
    "flip",
)
"""SIGKILL; os._exit; an exception; SIGSTOP; an endless sleep, with and without holding the GIL; a sleep in every step
from here on; an error of the operating system (:attr:`Fault.errno`, or a file size limit without one); a flipped bit of
a message that has arrived."""

FORWARD, BACKWARD, STEP, OPTIMIZER, SAVE, EVALUATE, FINISH = (
    "forward",
    "backward",
    "step",
    "optimizer",
    "save",
    "evaluate",
    "finish",
)
PLACES = (FORWARD, BACKWARD, STEP, OPTIMIZER, SAVE)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, on one rank, at one place."""

    kind: str
    rank: int
    step: int
    place: str
    number: int = 0
    """In attention: of the exchange in its direction, over all layers. While saving: of the file operation."""
    errno: int = 0
    seconds: float = 0.1
    """Of :data:`SLOW`."""


def write_plan(plan: Sequence[Fault | None], folder: Path) -> Path:
    """For :data:`VARIABLE`; what fires is recorded in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    path.write_text(json.dumps([None if fault is None else asdict(fault) for fault in plan]))
    return path


def own_fault(rank: int, attempt: int) -> tuple[Fault | None, Path]:
    """The fault of this process, and where to record that it fires."""
    path = Path(os.environ[VARIABLE])
    plan = json.loads(path.read_text())
    entry = plan[attempt] if attempt < len(plan) else None
    fault = None if entry is None else Fault(**entry)
    return fault if fault is not None and fault.rank == rank else None, path.with_name(
        f"fired-{attempt}.json"
    )


def seeded_kills(rng: Random, count: int, *, ranks: int, save_interval: int, exchanges: int) -> list[Fault]:
    """Kills of any rank at any place, each two to four steps after the last one."""
    plan, step = [], 1
    for _ in range(count):
        step += rng.randint(2, 4)
        place = rng.choice(PLACES)
        if place == SAVE:
            step += -step % save_interval
        number = rng.randrange(12 if place == SAVE else exchanges)
        plan.append(Fault(kind=KILL, rank=rng.randrange(ranks), step=step, place=place, number=number))
        step += save_interval if place == SAVE else 0  # that save may be lost, and its steps repeated
    return plan
