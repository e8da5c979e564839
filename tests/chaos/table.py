"""Many seeded faults, counted and timed; ``scripts/run_chaos.sh`` runs it and the documents show its table.

    python -m tests.chaos.table [--only SUITE,...] [--cases N] [--seed N] [--folder FOLDER]

Every row says how many cases were run and how many went as documented. A suite that is run again replaces its row.
"""

from __future__ import annotations

import argparse
import errno
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_lightseq.tools.markdown import markdown_table
from megatron_lightseq.tools.provenance import provenance
from tests.chaos import faults
from tests.chaos.driver import Outcome, Seen, run_plan
from tests.chaos.faults import Fault, seeded_kills
from tests.training.launched import REPOSITORY, launch, make_corpus, train_metrics

RESULTS = REPOSITORY / "docs" / "results"
PER_RUN = 20
"""Faults of one run: each is an attempt of it."""
MODELS: dict[str, dict[str, Any]] = {
    "CP 2": {},
    "CP 2, bf16": {"bf16": True},
    "TP 2": {"context_parallel_size": 1, "tensor_model_parallel_size": 2},
}


@dataclass
class Row:
    """One suite."""

    what: str
    cases: int
    good: int
    """Cases that went as documented."""
    details: str
    seed: int
    source: str = ""
    failed: list[str] = field(default_factory=list)
    """The others, in words."""


def kills(folder: Path, cases: int, seed: int) -> Iterable[Row]:
    """kill -9 of any rank at any place; then the whole run against an undisturbed one, bit for bit."""
    rng, corpus = random.Random(seed), make_corpus(folder)
    seen: list[Seen] = []
    same = runs = 0
    failed = []
    for number, (name, flags) in enumerate(_shared_out(cases)):
        plan = seeded_kills(rng, min(PER_RUN, cases - len(seen)), ranks=2, save_interval=2, exchanges=4)
        outcome = _disturbed(corpus, folder / str(number), plan, flags)
        runs += 1
        same += _is_undisturbed(corpus, folder / f"{number}-whole", outcome, plan, flags)
        seen += [one for one in outcome.attempts if one.fault is not None and one.fired is not None]
        if outcome.status != 0 or outcome.left:
            failed.append(f"{name}: status {outcome.status}, left {outcome.left}")
    named = [one for one in seen if one.names_the_rank]
    exact = [one for one in seen if one.names_the_place]
    failed += [str(one) for one in seen if not one.names_the_place]
    details = (
        f"rank named {len(named)}, step, phase and exchange {len(exact)}; "
        f"named after {_times(one.named_s for one in seen)}; all processes gone after "
        f"{_times(one.ended_s for one in seen)}"
    )
    yield Row(
        "kill -9 of any rank, anywhere in a step or a save",
        len(seen),
        len(named),
        details,
        seed,
        failed=failed,
    )
    yield Row(
        "those runs, restarted after every kill, against undisturbed ones",
        runs,
        same,
        "losses and gradient norms of all steps, bit for bit",
        seed,
    )


def stops(folder: Path, cases: int, seed: int) -> Iterable[Row]:
    """SIGSTOP, an endless sleep, and a held GIL, with the default limits of silence."""
    rng, corpus = random.Random(seed), make_corpus(folder)
    plan = [
        Fault(
            kind=rng.choice((faults.STOP, faults.GIL)),
            rank=rng.randrange(2),
            step=3 * number + 3,
            place=rng.choice((faults.FORWARD, faults.BACKWARD, faults.OPTIMIZER)),
            number=rng.randrange(4),
        )
        for number in range(cases)
    ]
    outcome = _disturbed(corpus, folder / "stops", plan, {})
    seen = [one for one in outcome.attempts if one.fired is not None]
    good = [one for one in seen if one.names_the_rank and (one.ended_s or 1e9) <= 45]
    details = (
        f"all processes gone after {_times(one.ended_s for one in seen)}, with the default limit of 30 s"
    )
    failed = [str(one) for one in seen if one not in good]
    yield Row(
        "SIGSTOP of a rank, or its interpreter held", len(seen), len(good), details, seed, failed=failed
    )


def flips(folder: Path, cases: int, seed: int) -> Iterable[Row]:
    """A bit of a message, on its way."""
    del folder
    from tests.core.test_checked_transport import found_flips

    found = found_flips(cases, seed)
    yield Row(
        "bits flipped in messages, with --cp-verify-transport",
        cases,
        found,
        "no other message was refused",
        seed,
    )


def files(folder: Path, cases: int, seed: int) -> Iterable[Row]:
    """Any file operation of a save fails, at once or in the background; the run goes on and leaves no rubbish."""
    from tests.chaos.sick_runs import run_sick
    from tests.chaos.test_saving import SAVING, check_folder, failing
    from tests.harness.ranks import close_pool, run_ranks

    rng, corpus = random.Random(seed), str(make_corpus(folder))
    undisturbed = run_ranks(1, run_sick, corpus, {"train_iters": SAVING["train_iters"]})[0]
    good, failed = 0, []
    for number in range(cases):
        code, operation = rng.choice((errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES)), rng.randrange(21)
        root = folder / str(number)
        settings = {**SAVING, "async_save": bool(number % 2), "save": str(root)}
        found = run_ranks(1, failing, corpus, settings, operation, code)[0]
        warned = sum(text.startswith("WARNING: no checkpoint was saved") for text in found.notes)
        try:
            check_folder(root)
            assert (found.error, found.weights, warned) == ("", undisturbed.weights, 1)
            good += 1
        except AssertionError as error:
            failed.append(
                f"{errno.errorcode[code]} in operation {operation}: {error} {found.error} {found.notes}"
            )
    close_pool()
    details = "the run goes on to the same weights, warns once, and leaves nothing half-written"
    yield Row("a file operation of a save fails", cases, good, details, seed, failed=failed)


def goodput(folder: Path, cases: int, seed: int) -> Iterable[Row]:
    """A kill about every 30 s, ``cases`` times; every 5 steps are saved."""
    rng, corpus = random.Random(seed), make_corpus(folder)
    flags = {"save_interval": 5, "hidden_size": 128, "num_layers": 4, "seq_length": 512}
    rate = _steps_per_second(corpus, folder / "rate", flags)
    plan, step = [], 0
    for _ in range(cases):
        step += max(5, round(rate * rng.uniform(20, 30)))  # a restart takes the rest of the 30 s
        place = rng.choice((faults.FORWARD, faults.BACKWARD, faults.OPTIMIZER))
        plan.append(Fault(kind=faults.KILL, rank=rng.randrange(2), step=step, place=place))
    steps = step + 20
    outcome = _disturbed(corpus, folder / "goodput", plan, {**flags, "train_iters": steps})
    share = json.loads((outcome.folder / "report" / "summary.json").read_text())
    same = _is_undisturbed(corpus, folder / "whole", outcome, plan, {**flags, "train_iters": steps})
    seconds = share["goodput_seconds"]
    details = (
        f"goodput {share['goodput']:.1%} of {seconds['wall']:.0f} s (restarts {seconds['restart']:.0f} s, repeated "
        f"steps {seconds['replay']:.0f} s, saving {seconds['save']:.0f} s); {'bit for bit' if same else 'NOT'} the "
        "undisturbed run"
    )
    yield Row(
        "a kill every 30 s", len(plan), len(plan) if same and share["goodput"] >= 0.8 else 0, details, seed
    )


SUITES: dict[str, tuple[Callable[[Path, int, int], Iterable[Row]], int]] = {
    "kills": (kills, 200),
    "stops": (stops, 10),
    "flips": (flips, 10_000),
    "files": (files, 546),
    "goodput": (goodput, 20),
}
"""Suites, and how many cases they have by default."""


def _shared_out(cases: int) -> list[tuple[str, dict[str, Any]]]:
    names = list(MODELS)
    return [(names[n % len(names)], MODELS[names[n % len(names)]]) for n in range(-(-cases // PER_RUN))]


def _disturbed(corpus: Path, folder: Path, plan: Sequence[Fault], flags: dict[str, Any]) -> Outcome:
    defaults = {"save_interval": 2, "save_keep_last": 3, "train_iters": plan[-1].step + 3, "resume": "auto"}
    return run_plan(corpus, folder, plan, **{**defaults, **flags})


def _is_undisturbed(
    corpus: Path, folder: Path, outcome: Outcome, plan: Sequence[Fault], flags: dict[str, Any]
) -> bool:
    run = launch(corpus, folder, **{"train_iters": plan[-1].step + 3, **flags, "save_interval": 10_000})
    if run.wait() != 0:
        return False
    ours, theirs = (
        [(m.step, m.loss, m.grad_norm) for m in train_metrics(x)] for x in (outcome.folder, folder)
    )
    return ours == theirs and bool(ours)


def _steps_per_second(corpus: Path, folder: Path, flags: dict[str, Any]) -> float:
    run = launch(corpus, folder, **{**flags, "train_iters": 40})
    assert run.wait() == 0, run.text()
    return 1.0 / statistics.median(m.step_seconds for m in train_metrics(folder)[10:])


def _times(seconds: Iterable[float | None]) -> str:
    known = sorted(value for value in seconds if value is not None)
    if not known:
        return "an unknown time"
    return f"{statistics.median(known):.1f} s (at most {known[-1]:.1f} s)"


def write(rows: Sequence[Row]) -> None:
    """Replace these rows of the recorded table, and write it as JSON and Markdown."""
    path = RESULTS / "chaos.json"
    known = [Row(**entry) for entry in json.loads(path.read_text())] if path.exists() else []
    new = {row.what for row in rows}
    table = [row for row in known if row.what not in new] + list(rows)
    path.write_text(json.dumps([asdict(row) for row in table], indent=1) + "\n")
    cells = [[row.what, f"{row.cases:,}", f"{row.good:,}", row.details] for row in table]
    lines = [markdown_table(["fault", "cases", "as documented", "seen"], cells), ""]
    for source in dict.fromkeys(row.source for row in table):
        lines.append(f"{'; '.join(row.what for row in table if row.source == source)}: {source}.")
        lines.append("")
    (RESULTS / "chaos.md").write_text("\n".join(lines).rstrip() + "\n")


def main() -> int:
    """Run suites; returns 1 if a case went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SUITES), help=f"of {', '.join(SUITES)}")
    parser.add_argument("--cases", type=int, help="of each suite, in place of its own number")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep what the runs have written here")
    given = parser.parse_args()
    bad = False
    for name in given.only.split(","):
        suite, cases = SUITES[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = (given.folder or Path(temporary)) / name
            folder.mkdir(parents=True)
            rows = list(suite(folder, given.cases or cases, given.seed))
        for row in rows:
            command = f"`bash scripts/run_chaos.sh --only {name} --cases {given.cases or cases} --seed {given.seed}`"
            row.source = f"{command}, {provenance()}"
            print(
                f"{row.what}: {row.good} of {row.cases}; {row.details}", *row.failed, sep="\n  ", flush=True
            )
            bad |= row.good < row.cases
        write(rows)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
