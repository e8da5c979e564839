"""torchrun with readable endings, for scripts/pretrain_gpt.sh. Takes torchrun's arguments.

torchrun prints a traceback after the messages of the ranks whenever a run is stopped or fails. Here

* a run stopped by Ctrl-C or SIGTERM ends with status 0 if all ranks end by themselves (they save first), and with
  128 + the signal after a second signal, or if ranks have to be killed;
* a run in which a rank fails ends with that rank's exit code and one line that names it.
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
    """Counts the ranks that torchrun has to kill, which it only reports in its log."""

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
        second_signal = isinstance(stopped.__context__, SignalException)
        return 128 + stopped.sigval if killed.count or second_signal else 0
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else f"signal {-failure.exitcode}"
        _say(f"error: rank {rank} failed first, with {how}; see its messages above")
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _say(line: str) -> None:
    print(f"[lightseq] {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
