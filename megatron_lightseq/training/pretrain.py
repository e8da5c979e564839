"""``lightseq pretrain``, on one rank."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lightseq.config import Machine, PretrainConfig, ResolvedConfig, resolve
from megatron_lightseq.errors import PeerFailureError
from megatron_lightseq.training.job.failure import EXIT_PEER_FAILED
from megatron_lightseq.training.job.launch import Launch
from megatron_lightseq.training.job.rank_log import note, rank_log
from megatron_lightseq.training.job.signals import StopRequest, stop_on_signals

_LEAVE_WITHIN_S = 30.0


Body = Callable[[ResolvedConfig, StopRequest], None]
"""What a rank does once its configuration is resolved."""


def pretrain(config: PretrainConfig, checked: Machine) -> int:
    """Train as configured, together with the other ranks; see :func:`run_body`."""
    return run_body(config, checked, _train)


def run_body(config: PretrainConfig, checked: Machine, body: Body) -> int:
    """Run ``body`` on this rank, with warnings of ours on standard error; returns the exit status.

    0: it has ended, or was stopped in order by a signal or a time limit. 3: another rank failed, which the message on
    standard error names. This rank's own errors are raised.

    Args:
        config: of the run.
        checked: the machine as far as it was known when the configuration's rules were checked; here they are checked
            against what was not known then.
        body: joins the other ranks, and works with them.

    Raises:
        LightSeqError: this rank failed first; the subclass says in what.
    """
    launch = Launch.from_environment()
    rank, world_size = launch.rank, launch.world_size
    with _without_noise():
        from megatron_lightseq.megatron.lazy_compile import import_megatron
        from megatron_lightseq.training.machine import this_machine

        import_megatron()
        resolved = resolve(config, this_machine(world_size), checked=checked)
    logging_to = config.logging.report_dir or config.checkpoint.save
    folder = None if logging_to is None else Path(logging_to)
    with stop_on_signals() as stop, _messages(rank), rank_log(folder, launch):
        try:
            with _without_noise():
                body(resolved, stop)
        except PeerFailureError as error:
            _bound_exit(stop)
            note(str(error))
            sys.stderr.write(f"rank {rank}: {error}\n")
            return EXIT_PEER_FAILED
        except BaseException:
            _bound_exit(stop)
            raise
    return 0


def _train(resolved: ResolvedConfig, stop: StopRequest) -> None:
    """All steps, or the run was stopped in order; with a checkpoint if one was asked for."""
    from megatron_lightseq.training.data.datasets import open_corpora, verify_contents
    from megatron_lightseq.training.job.join import join
    from megatron_lightseq.training.loop import build_loop
    from megatron_lightseq.training.reporting.lasting_stream import LastingStream
    from megatron_lightseq.training.reporting.report import finish

    corpora = open_corpora(resolved.config)
    with join(resolved, corpora.fingerprint) as job:
        if resolved.config.data.verify_data:
            verify_contents(corpora, part=job.launch.rank, num_parts=job.launch.world_size)
        outcome = build_loop(job, resolved, corpora, stop).run()
        if job.launch.rank == 0:
            output = LastingStream(sys.stdout)
            output.write("".join(line + "\n" for line in finish(resolved, corpora, outcome)))
            output.flush()


@contextmanager
def _without_noise() -> Iterator[None]:
    """Suppress warnings that Megatron gives on every rank of every run and that do not matter here.

    They are about Transformer Engine and apex, which are optional, and about the default of a CUDA graph setting.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Apex")
        warnings.filterwarnings("ignore", message="full scope is deprecated")
        yield


def _bound_exit(stop: StopRequest) -> None:
    """If peers are gone, tearing down the process group can hang interpreter shutdown: have a C-level watchdog end
    the process after :data:`_LEAVE_WITHIN_S` seconds.
    """
    stop.leave()
    atexit.register(faulthandler.dump_traceback_later, _LEAVE_WITHIN_S, exit=True)


@contextmanager
def _messages(rank: int) -> Iterator[None]:
    """Print this package's warnings to standard error, on rank 0."""
    package = logging.getLogger("megatron_lightseq")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.addFilter(lambda record: rank == 0 or record.levelno >= logging.ERROR)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
