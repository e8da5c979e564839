"""Goodput of runs whose every second is known, and ranks that are slow among many that are not."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from megatron_lightseq.training.health.stragglers import Place, StragglerWatch
from megatron_lightseq.training.reporting.goodput import goodput
from megatron_lightseq.training.reporting.metrics import Attempt, Line, SaveMetrics, ValidationMetrics
from tests.training.test_progress import metrics

# ---- goodput --------------------------------------------------------------------------------------------------


class Written:
    """A metrics file, on a clock that is set by hand."""

    def __init__(self, clock: float = 1000.0) -> None:
        self.now = clock
        self.lines: list[Line] = []

    def attempt(self, step: int, restart: int = 0, set_up: float = 7.0) -> None:
        began, self.now = self.now, self.now + set_up
        value = Attempt(step=step, restart=restart, began=began, world_size=2, host="here")
        self.lines.append(Line(self.now, value))

    def back(self, step: int) -> None:
        self.lines.append(
            Line(self.now, Attempt(step=step, restart=0, began=None, world_size=2, host="here"))
        )

    def steps(self, *numbers: int, seconds: float = 2.0, skipped: bool = False) -> None:
        for number in numbers:
            self.now += seconds
            self.lines.append(Line(self.now, metrics(number, step_seconds=seconds, skipped=skipped)))

    def save(self, step: int, seconds: float = 1.0) -> None:
        self.now += seconds
        self.lines.append(Line(self.now, SaveMetrics(step=step, seconds=seconds)))

    def evaluate(self, step: int, seconds: float = 3.0) -> None:
        self.now += seconds
        self.lines.append(Line(self.now, ValidationMetrics(step=step, loss=1.0, num_tokens=1)))


def parts(written: Written) -> dict[str, float]:
    found = goodput(written.lines)
    assert found is not None
    names = ("wall", "useful", "start", "save", "restart", "replay", "other")
    return {name: getattr(found, name) for name in names}


def test_a_killed_run_that_its_launcher_restarts() -> None:
    run = Written()
    run.attempt(0)
    run.steps(1, 2)
    run.save(2)
    run.steps(3, 4)
    run.now += 5.0  # until the launcher has noticed
    run.attempt(2, restart=1)
    run.steps(3, 4, 5)
    run.evaluate(5)
    assert parts(run) == {
        "wall": 37.0,
        "useful": 10.0,
        "start": 7.0,
        "save": 1.0,
        "restart": 12.0,
        "replay": 4.0,
        "other": 3.0,
    }
    text = str(goodput(run.lines))
    assert text.startswith(
        "goodput 27.0% of 37s: start 18.9%, saving 2.7%, restarts 32.4%, repeated steps 10.8%"
    )


def test_the_night_between_two_commands_is_not_counted() -> None:
    run = Written()
    run.attempt(0)
    run.steps(1, 2)
    run.save(2)
    run.now += 36_000.0
    run.attempt(2)
    run.steps(3, 4)
    found = parts(run)
    assert (found["wall"], found["useful"], found["start"]) == (23.0, 8.0, 14.0)


def test_a_run_that_goes_back_and_steps_that_are_skipped() -> None:
    run = Written()
    run.attempt(0)
    run.steps(1, 2, 3)
    run.back(1)
    run.steps(2)
    run.steps(3, skipped=True)
    found = parts(run)
    assert (found["useful"], found["replay"], found["other"]) == (4.0, 4.0, 2.0)


def test_a_clock_that_is_set_back_loses_time_and_nothing_else() -> None:
    run = Written()
    run.attempt(0)
    run.steps(1, 2)
    run.now -= 1e6
    run.attempt(1, restart=1)
    run.steps(2, 3)
    found = parts(run)
    assert (found["useful"], found["replay"], found["restart"]) == (6.0, 2.0, 0.0)
    assert found["wall"] < 30.0


def test_a_new_run_in_an_old_folder_starts_anew_and_old_files_have_no_goodput() -> None:
    run = Written()
    run.steps(1, 2)
    assert goodput(run.lines) is None
    run.attempt(0)
    run.steps(1)
    run.attempt(0)
    run.steps(1)
    assert parts(run)["wall"] == 9.0


# ---- stragglers -----------------------------------------------------------------------------------------------


def places(size: int, stages: int = 1, shares: tuple[float, ...] = (1.0,)) -> list[Place]:
    return [
        Place(host=f"host{rank // 8}", stage=rank % stages, share=shares[rank % len(shares)])
        for rank in range(size)
    ]


def clean_steps(rng: random.Random, size: int, mean_s: float) -> Iterator[list[float]]:
    """Work with noise, with pauses of single ranks, and with bursts in which the host of eight ranks is slow."""
    burst, slow = 0, 0
    while True:
        busy = [mean_s * rng.lognormvariate(0.0, 0.15) for _ in range(size)]
        if rng.random() < 0.02:
            busy[rng.randrange(size)] += rng.choice((1.0, 5.0)) * mean_s
        if burst == 0 and rng.random() < 0.003:
            burst, slow = rng.randint(1, 6), rng.randrange(size)
        if burst:
            burst -= 1
            busy[slow] *= 4
        yield busy


@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_ten_thousand_clean_steps_raise_no_alarm(size: int) -> None:
    watch, steps = StragglerWatch(places(size), 2.0), clean_steps(random.Random(size), size, 0.1)
    count = 10_000 if size < 64 else 2_000
    assert not [
        found for busy, _ in zip(steps, range(count), strict=False) if (found := watch.add(busy, max(busy)))
    ]


@pytest.mark.parametrize(("size", "slow"), [(2, 1), (3, 0), (8, 5), (64, 63)])
@pytest.mark.parametrize("after", [0, 100])
def test_a_rank_that_becomes_slow_is_named_once_within_20_steps(size: int, slow: int, after: int) -> None:
    watch, steps = StragglerWatch(places(size), 2.0), clean_steps(random.Random(7), size, 0.1)
    named = []
    for number in range(after + 60):
        busy = next(steps)
        if number >= after:
            busy[slow] += 0.4
        named += [(number, found) for found in watch.add(busy, max(busy))]
    ((number, found),) = named
    assert number - after < 20
    assert (found.rank, found.host) == (slow, f"host{slow // 8}")
    assert f"rank {slow} on host{slow // 8} works" in str(found)


def test_a_rank_that_recovers_can_be_named_again() -> None:
    watch, named = StragglerWatch(places(3), 2.0), 0
    for number in range(120):
        named += len(watch.add([0.1, 0.5 if number // 30 % 2 else 0.1, 0.1], 0.5))
    assert named == 2


def test_work_that_the_schedule_gives_a_rank_is_no_slowness() -> None:
    """A causal ring over contiguous chunks: the last rank has most of the work."""
    shares = (1 / 16, 3 / 16, 5 / 16, 7 / 16)
    for factor, expected in ((1.0, shares), (0.0, (1.0,))):
        watch = StragglerWatch(places(4, shares=expected), 2.0)
        named = [found for _ in range(40) for found in watch.add([0.1 * share for share in shares], 0.05)]
        assert len(named) == (0 if factor else 1)


def test_ranks_are_compared_within_their_pipeline_stage() -> None:
    """The last stage has the output layer."""
    watch = StragglerWatch(places(4, stages=2), 2.0)
    assert not [found for _ in range(40) for found in watch.add([0.1, 0.4, 0.1, 0.4], 0.4)]
    assert [f.rank for _ in range(40) for f in watch.add([0.1, 0.4, 0.4, 0.4], 0.4)] == [2]


def test_what_does_not_matter_is_not_reported() -> None:
    watch = StragglerWatch(places(3), 2.0)
    assert not [f for _ in range(40) for f in watch.add([0.001, 0.009, 0.001], 0.01)], "8 ms"
    assert not [f for _ in range(40) for f in watch.add([0.02, 0.06, 0.02], 1.0)], "of a second"
