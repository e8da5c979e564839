"""The `lightseq` command and its subcommands, each imported when it is called.

Exit status: 0 success, 1 failure while running, 2 error in the command line or its files.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_lightseq import __version__
from megatron_lightseq.config.names import nearest
from megatron_lightseq.errors import ConfigError, DataError, LayoutError, LightSeqError, UnsupportedError
from megatron_lightseq.training.job.launch import Launch

USER_ERRORS = (ConfigError, DataError, LayoutError, UnsupportedError)
"""Errors in what the user asked for; all others happened while doing it."""
OTHER_RANKS_WAIT_S = 3.0
"""How long other ranks wait before they repeat an error that the first rank of their host has printed."""


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its module and what it does."""

    module: str
    summary: str

    def load(self) -> Callable[[Sequence[str]], int]:
        """Import the module; returns its function from arguments to exit status."""
        run_command: Callable[[Sequence[str]], int] = importlib.import_module(self.module).run
        return run_command


COMMANDS = {
    "pretrain": Command(
        "megatron_lightseq.cli.pretrain", "train a GPT model; start it with torchrun to use several ranks"
    ),
    "eval": Command(
        "megatron_lightseq.cli.evaluate", "the loss of a checkpoint by position; also on several ranks"
    ),
    "prepare-data": Command("megatron_lightseq.cli.prepare_data", "turn text into a corpus of tokens"),
    "import-hf": Command(
        "megatron_lightseq.cli.import_hf", "turn a Hugging Face model into a checkpoint and a recipe"
    ),
    "export-hf": Command("megatron_lightseq.cli.export_hf", "turn a checkpoint into a Hugging Face model"),
    "schedule": Command("megatron_lightseq.cli.schedule", "print or draw which rank computes what, and when"),
    "compare": Command(
        "megatron_lightseq.cli.compare", "train with several systems and compare speed, memory and traffic"
    ),
    "verify": Command(
        "megatron_lightseq.cli.verify",
        "check every combination of method and parallelism against a single process",
    ),
    "megatron-lm": Command(
        "megatron_lightseq.cli.megatron_lm", "run an unmodified Megatron-LM script with our attention"
    ),
    "bench": Command(
        "megatron_lightseq.cli.bench",
        "time the CPU attention kernel against torch's, its scaling with threads, and overlapped transfers",
    ),
    "plan": Command(
        "megatron_lightseq.cli.plan", "plan memory and time of a run on a cluster that is not here"
    ),
    "doctor": Command("megatron_lightseq.cli.doctor", "report what this machine offers and what is missing"),
}


def run(arguments: Sequence[str]) -> int:
    """Run a command line. LightSeqErrors become a message on standard error; other exceptions propagate."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        sys.stdout.write(f"megatron-lightseq {__version__}\n")
        return 0
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        hint = f"Perhaps {near} was meant" if near else f"The commands are {', '.join(COMMANDS)}"
        sys.stderr.write(f"lightseq: there is no command {name!r}. {hint}.\n")
        return 2
    try:
        return COMMANDS[name].load()(rest)
    except LightSeqError as error:
        return _refuse(name, error)


def _refuse(name: str, error: LightSeqError) -> int:
    """Print the error. Errors in files and flags are the same on all ranks of a host, so the first rank prints them.

    torchrun ends the other ranks as soon as one has exited, so they wait. A rank that is still running after that is
    the only one with the error.
    """
    is_users = isinstance(error, USER_ERRORS)
    if is_users and Launch.from_environment().local_rank > 0:
        time.sleep(OTHER_RANKS_WAIT_S)
    sys.stderr.write(f"lightseq {name}: {error}\n")
    return 2 if is_users else 1


def usage() -> str:
    """The help text of `lightseq`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lightseq COMMAND [arguments]",
            "",
            "LightSeq / DistFlashAttn context parallelism for Megatron-Core.",
            "",
            *lines,
            "",
            "`lightseq COMMAND --help` describes one of them.",
            "",
        ]
    )
