"""torchrun, with ends that a person can read: for scripts/pretrain_gpt.sh. Takes torchrun's arguments.

torchrun itself ends every run that was stopped or failed in a traceback of its own, below what the ranks had to say.
Here

* a run stopped by Ctrl-C or SIGTERM ends with 0 when all ranks ended by themselves (they save first), and with
  128 + the signal when a second signal hurried them or when they had to be killed;
* a run in which a rank failed ends with that rank's exit code, and one line that names it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

_ELASTIC_LOGGER = "torch.distributed.elastic.multiprocessing.api"


class KilledRanks(logging.Handler):
    """Counts the ranks that torchrun had to kill, which it tells its log only."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        self.count += "forcefully exiting" in record.getMessage()


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun; returns the exit status."""
    killed = KilledRanks()
    logging.getLogger(_ELASTIC_LOGGER).addHandler(killed)
    try:
        torchrun(list(arguments))
    except SignalException as stopped:
        if killed.count:
            _say(f"{killed.count} rank(s) did not end in time after {stopped.sigval.name} and were killed")
        hurried = isinstance(stopped.__context__, SignalException)
        return 128 + stopped.sigval if killed.count or hurried else 0
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else f"signal {-failure.exitcode}"
        _say(f"error: rank {rank} ended first, with {how}; what it had to say is above")
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _say(line: str) -> None:
    print(f"[lightseq] {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
