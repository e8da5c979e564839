"""How many flag sets of real Megatron-LM programs train through ``lightseq megatron-lm``, and with which losses.

    python scripts/try_flag_sets.py PATH/TO/Megatron-LM [--only TEXT] [--context-parallel] [--out FILE]

Every set of :mod:`flag_sets` is scaled down and trains for three steps on this machine's CPUs. Sets with context
parallelism are compared with the same set on one context-parallel rank, in the same pipeline. The reference is
Megatron-LM's own attention (``--cp-method megatron``), or ours where its own does not run on a CPU or gets gradients
that depend on the ranks (latent attention, mixtures of experts). A set that does not train is tried with
Megatron-LM's own attention too. Sets that are equal after scaling are run once.

Megatron is imported once, and every rank is a fork. PYTHONPATH must hold what Megatron-LM imports
(docs/megatron-lm.md).
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from flag_sets import FlagSet, collect, one_context_rank, scaled
from typing_extensions import override

TOLERANCE = 2e-5
"""Relative, of a loss: it is printed with seven digits, and sums are in fp32."""
SECONDS = 240
"""For one run."""


@dataclass(frozen=True)
class Outcome:
    """Of one flag set."""

    name: str
    ranks: int
    context_parallel: int
    verdict: str
    """``same`` or ``differs`` (with context parallelism), ``trains``, ``ours refuses``, ``ours fails``, or
    ``Megatron-LM fails``: it does so without us, too."""
    losses: tuple[float, ...] = ()
    expected: tuple[float, ...] = ()
    message: str = ""


@dataclass(frozen=True)
class Run:
    """What the ranks of one run printed."""

    losses: tuple[float, ...]
    message: str
    """Of the error, if there was one."""

    @property
    def trained(self) -> bool:
        """Whether all steps were taken."""
        return len(self.losses) == 3 and all(map(math.isfinite, self.losses)) and not self.message


class Trainer:
    """Runs training scripts of one checkout on forks of this process; equal runs only once."""

    def __init__(self, checkout: Path) -> None:
        self._checkout = checkout
        self._runs: dict[str, Run] = {}
        self._port = 20000 + os.getpid() % 20000
        typing.override = override  # type: ignore[attr-defined]
        sys.path.insert(0, str(checkout))
        os.environ.update(
            NCCL_ALGO="Ring", CUBLAS_WORKSPACE_CONFIG=":4096:8"
        )  # --deterministic-mode asks for them
        from megatron_lightseq.megatron.lm import cpu

        cpu.activate()
        for name in ("megatron.training", "megatron.core.models.gpt", "megatron.core.datasets.gpt_dataset"):
            importlib.import_module(name)

    def run(self, given: FlagSet, ranks: int, method: str) -> Run:
        """Three steps on this number of ranks."""
        words = [word for name, values in sorted(given.flags.items()) for word in (name, *values)]
        words += ["--cp-method", method]
        key = f"{given.script} {ranks} {words}"
        if key not in self._runs:
            self._runs[key] = self._start(self._checkout / given.script, words, ranks)
        return self._runs[key]

    def _start(self, script: Path, words: list[str], ranks: int) -> Run:
        self._port += 1
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder) / f"{rank}.log" for rank in range(ranks)]
            children = [self._fork(script, words, rank, ranks, log) for rank, log in enumerate(logs)]
            failed = _wait(children)
            text = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
        losses = re.findall(r"iteration +\d+/.*?lm loss(?: \d)?: ([0-9.naif]+(?:E[+-]\d+)?)", "".join(text))
        if os.environ.get("FLAG_SETS_LOG"):
            Path(os.environ["FLAG_SETS_LOG"]).write_text("\n----\n".join(text), encoding="utf-8")
        return Run(tuple(map(float, losses)), _message(text) if failed else "")

    def _fork(self, script: Path, words: list[str], rank: int, ranks: int, log: Path) -> int:
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.setpgid(0, 0)
            faulthandler.dump_traceback_later(SECONDS - 10)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            os.environ.update(
                LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self._port)
            )
            os.chdir(log.parent)
            status = _train(script, words)
        finally:
            sys.stdout.flush()
            os._exit(status)


def _train(script: Path, words: list[str]) -> int:
    from megatron_lightseq.megatron.lm.launcher import launch

    try:
        launch(script, words, quiet=True)
    except SystemExit as left:
        return int(left.code or 0)
    except BaseException as error:  # noqa: BLE001 - it is what this script reports
        traceback.print_exc()
        print(f"\nFAILED {type(error).__name__}: {error}\nEND")
        return 1
    return 0


def _wait(children: list[int]) -> bool:
    """Whether one of them failed; the others are ended then."""
    deadline, left, failed = time.monotonic() + SECONDS, set(children), False
    while left:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            left.discard(child)
            failed = failed or status != 0
        if (failed and child) or time.monotonic() > deadline:
            failed = True
            time.sleep(1)
            for each in left:
                os.kill(each, signal.SIGKILL)
                os.waitpid(each, 0)
            break
        if not child:
            time.sleep(0.05)
    return failed


def _message(texts: list[str]) -> str:
    for text in texts:
        found = re.search(r"^FAILED (.*?)\nEND", text, re.MULTILINE | re.DOTALL)
        if found and "Connection" not in found[1]:
            return found[1]
    usage = [line for text in texts for line in text.splitlines() if "error:" in line]
    return usage[0] if usage else next((text[-1500:] for text in texts if text), "no output")


def judge(given: FlagSet, trainer: Trainer) -> Outcome:
    """Train one set, scaled down, with our attention; with context parallelism, compare with one rank of it."""
    small, ranks = scaled(given)
    size = small.size("--context-parallel-size")
    ours = trainer.run(small, ranks, "lightseq")
    if ours.trained and size == 1:
        return Outcome(given.name, ranks, size, "trains", ours.losses)
    if "UnsupportedError" in ours.message or "ConfigError" in ours.message:
        return Outcome(given.name, ranks, size, "ours refuses", message=ours.message)
    needs_ours = size > 1 and ("--num-experts" in small.flags or "--multi-latent-attention" in small.flags)
    alone, fewer = one_context_rank(small)
    reference = trainer.run(alone, fewer, "lightseq" if needs_ours else "megatron")
    if not ours.trained:
        verdict = "ours fails" if reference.trained else "Megatron-LM fails"
        return Outcome(given.name, ranks, size, verdict, message=ours.message)
    verdict = "trains"
    if reference.trained:
        pairs = zip(ours.losses, reference.losses, strict=True)
        close = all(math.isclose(mine, theirs, rel_tol=TOLERANCE) for mine, theirs in pairs)
        verdict = "same" if close else "differs"
    return Outcome(given.name, ranks, size, verdict, ours.losses, reference.losses, reference.message)


def main() -> None:
    """Judge all sets, print each outcome, and count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", default="", help="sets whose names contain this")
    parser.add_argument("--context-parallel", action="store_true", help="sets with context parallelism")
    parser.add_argument("--out", type=Path, help="write the outcomes as JSON")
    options = parser.parse_args()
    sets = [
        each
        for each in collect(options.checkout)
        if options.only in each.name
        and (each.size("--context-parallel-size") > 1 or not options.context_parallel)
    ]
    trainer = Trainer(options.checkout.resolve())
    outcomes = []
    for given in sets:
        started = time.monotonic()
        outcomes.append(judge(given, trainer))
        last = outcomes[-1]
        print(
            f"{last.verdict:20} {time.monotonic() - started:5.1f} s, {last.ranks} ranks, CP {last.context_parallel}: "
            f"{last.name} {last.losses} {last.expected if last.verdict == 'differs' else ''} {last.message[:600]!r}",
            flush=True,
        )
    for size, chosen in (
        ("all", outcomes),
        ("CP > 1", [each for each in outcomes if each.context_parallel > 1]),
    ):
        print(size, len(chosen), dict(Counter(each.verdict for each in chosen)))
    if options.out:
        options.out.write_text(
            json.dumps([each.__dict__ for each in outcomes], indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
