"""torchrun with a private store, readable endings and no orphans, for the launch scripts. Takes torchrun's arguments.

* ``--standalone`` opens no port to the network (:mod:`~megatron_lightseq.training.job.one_host`).
* SIGTERM, Ctrl-C, SIGHUP (a closed terminal; not under nohup) and SIGUSR1 (Slurm) stop the run in order. The exit
  status is 0 only if all ranks end with 0, which they do after saving. Otherwise it is a failing rank's own status, or
  128 + the signal after a second signal or if ranks have to be killed.
* A run in which a rank fails ends with that rank's exit status and one line that says which rank failed first, and why.
* A run that fails :data:`ATTEMPTS_WITHOUT_PROGRESS` times without getting further is not restarted again.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.elastic.rendezvous as rendezvous
import torch.distributed.launcher.api as torch_launcher
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun

from megatron_lightseq.training.job import one_host
from megatron_lightseq.training.job.failure import EXIT_PEER_FAILED, Failure, recorded
from megatron_lightseq.training.job.heartbeat import read_beat
from megatron_lightseq.training.job.launch import attempt_prefix

ATTEMPTS_WITHOUT_PROGRESS = 3
"""Consecutive attempts that fail at a step which an earlier one reached already."""
_STOP_SIGNALS = ("SIGTERM", "SIGINT")
"""What torchrun hands on to the ranks; the signals in :data:`_LIKE_SIGTERM` become SIGTERM first."""
_LIKE_SIGTERM = (signal.SIGHUP, signal.SIGUSR1)
_BECAUSE_OF_ANOTHER = (EXIT_PEER_FAILED, -signal.SIGTERM)
"""Exit statuses of ranks that ended because another one failed."""
_ELASTIC_LOGGER = "torch.distributed.elastic.multiprocessing.api"


def main(arguments: Sequence[str]) -> int:
    """Run torchrun; returns the exit status."""
    missing = missing_seams()
    if missing:
        _say(
            f"error: torch {torch.__version__} lacks {', '.join(missing)}, which this launcher builds on: it was "
            "tested with torch 2.13. Install that, or start the ranks with torchrun itself"
        )
        return 1
    one_host.register()
    torch_launcher.LocalElasticAgent = _Agent  # type: ignore[misc]  # torchrun has no other way to get at the ranks' ends
    killed = _KilledRanks()
    logging.getLogger(_ELASTIC_LOGGER).addHandler(killed)
    _take_signals()
    try:
        torchrun(_translated(arguments))
    except SignalException as stopped:
        return _stopped(stopped, killed.count)
    except ChildFailedError as failed:
        return _failed(failed)
    return 0


def missing_seams() -> list[str]:
    """What this launcher replaces or calls inside torchrun, and this release of torch does not have, by name."""
    wanted: dict[str, tuple[Any, str, tuple[str, ...]]] = {
        "launcher.api.LocalElasticAgent": (torch_launcher, "LocalElasticAgent", ()),
        "LocalElasticAgent._monitor_workers": (LocalElasticAgent, "_monitor_workers", ("worker_group",)),
        "LocalElasticAgent._shutdown": (LocalElasticAgent, "_shutdown", ("death_sig",)),
        "RendezvousInfo": (
            rendezvous,
            "RendezvousInfo",
            ("store", "rank", "world_size", "bootstrap_store_info"),
        ),
        "RendezvousStoreInfo": (rendezvous, "RendezvousStoreInfo", ("master_addr", "master_port")),
        "RendezvousHandler.use_agent_store": (rendezvous.RendezvousHandler, "use_agent_store", ()),
    }
    found = []
    for name, (owner, attribute, parameters) in wanted.items():
        seam = getattr(owner, attribute, None)
        if seam is None:
            found.append(name)
        elif parameters:
            known = inspect.signature(seam).parameters
            found += [f"{name}({parameter})" for parameter in parameters if parameter not in known]
    return found


def _translated(arguments: Sequence[str]) -> list[str]:
    """``--standalone`` is our rendezvous."""
    ours = ["--nnodes=1", f"--rdzv-backend={one_host.BACKEND}"]
    if "--standalone" not in arguments:
        return list(arguments)
    at = arguments.index("--standalone")
    return [*arguments[:at], *ours, *arguments[at + 1 :]]


class _KilledRanks(logging.Handler):
    """Counts the ranks that torchrun has to kill, which it only reports in its log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        self.count += "forcefully exiting" in record.getMessage()


class _Agent(LocalElasticAgent):
    """torchrun's agent, which also keeps what the ranks leave: exit statuses, progress, and the first failure."""

    last: ClassVar[_Agent | None] = None
    """torchrun makes the agent, and does not hand it out."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.statuses: Mapping[int, int] = {}
        """Exit statuses by local rank after a stop; negative for signals."""
        self.failure: Failure | None = None
        """The first failure of the last attempt, if the ranks have recorded one."""
        self._furthest = -1
        self._attempts_there = 0
        _Agent.last = self

    def _shutdown(self, *arguments: Any, **settings: Any) -> None:
        super()._shutdown(*arguments, **settings)
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        found = {rank: handler.proc.returncode for rank, handler in handlers.items()}
        self.statuses = {rank: code for rank, code in found.items() if code is not None}

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        result = super()._monitor_workers(worker_group)
        handler = worker_group.spec.rdzv_handler
        if result.state == WorkerState.FAILED and isinstance(handler, one_host.OneHostRendezvous):
            attempt = worker_group.spec.max_restarts - self._remaining_restarts
            assert handler.store is not None, "the workers ran"
            self._learn(dist.PrefixStore(attempt_prefix(attempt), handler.store), worker_group, attempt)
        return result

    def _learn(self, store: dist.Store, worker_group: Any, attempt: int) -> None:
        """Read what the ranks of a failed attempt have left in their store; stop a loop of crashes."""
        self.failure = recorded(store)
        beats = [read_beat(store, worker.global_rank) for worker in worker_group.workers]
        step = max((beat.step for beat in beats if beat is not None), default=0)
        self._attempts_there = 1 if step > self._furthest else self._attempts_there + 1
        self._furthest = max(step, self._furthest)
        if self._remaining_restarts > 0 and self._attempts_there < ATTEMPTS_WITHOUT_PROGRESS:
            cause = "a rank failed, see above" if self.failure is None else self.failure
            _say(
                f"attempt {attempt} failed: {cause}; the ranks are restarted ({self._remaining_restarts} left)"
            )
        if self._remaining_restarts > 0 and self._attempts_there >= ATTEMPTS_WITHOUT_PROGRESS:
            _say(
                f"not restarted again: {self._attempts_there} attempts have failed without getting beyond step "
                f"{self._furthest}; {self._remaining_restarts} restart(s) were left"
            )
            self._remaining_restarts = 0


def _take_signals() -> None:
    """Let :data:`_LIKE_SIGTERM` act like SIGTERM. What is ignored, as SIGHUP under nohup, stays ignored."""
    # torchrun reads its defaults from PET_*; older releases of torch know the second name only.
    os.environ["PET_SIGNALS_TO_HANDLE"] = os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(
        _STOP_SIGNALS
    )

    def forward(_number: int, _frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    for number in _LIKE_SIGTERM:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)


def _stopped(stopped: SignalException, num_killed: int) -> int:
    by_signal = 128 + int(stopped.sigval)
    if num_killed:
        _say(f"{num_killed} rank(s) did not end in time after {stopped.sigval.name} and were killed")
        return by_signal
    if isinstance(stopped.__context__, SignalException):  # a second signal
        return by_signal
    statuses = {} if _Agent.last is None else _Agent.last.statuses
    for rank, status in sorted(statuses.items()):
        if status != 0:
            _say(
                f"error: rank {rank} ended with {_how(status)} after {stopped.sigval.name}; nothing more was saved"
            )
            return status if status > 0 else 128 - status
    return 0


def _failed(failed: ChildFailedError) -> int:
    known = None if _Agent.last is None else _Agent.last.failure
    if known is None:
        rank, first = _culprit(failed.failures) or failed.get_first_failure()
        status = first.exitcode
        _say(f"error: rank {rank} failed first, with {_how(status)}; see its messages above")
    else:
        own = failed.failures.get(known.rank)
        # A rank that ends slowly after its error is stopped by torchrun once another one has ended because of it.
        status = own.exitcode if own is not None and own.exitcode not in _BECAUSE_OF_ANOTHER else 1
        _say(f"error: {known}; {_how(status)}")
    return status if status > 0 else 128 - status


def _culprit(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure] | None:
    """The first to fail among those that did not end because of another rank."""
    own = {r: f for r, f in failures.items() if f.exitcode not in _BECAUSE_OF_ANOTHER}
    return min(own.items(), key=lambda item: item[1].timestamp, default=None)


def _how(status: int) -> str:
    return f"exit code {status}" if status > 0 else f"signal {-status}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads: no reason to end otherwise
        print(f"[lightseq] {line}", file=sys.stderr, flush=True)
