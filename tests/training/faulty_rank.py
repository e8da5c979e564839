"""One rank of a group that runs all-reduces until it fails; run as a script by test_faults.

    python -m tests.training.faulty_rank FAULT RANK

RANK commits FAULT at step 20: raise, exit (without a message), stop (SIGSTOP), sleep, or nothing. With the fault "late"
it runs to the end, and is then delayed between two checks of whether the others have finished.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_lightseq.errors import PeerFailureError
from megatron_lightseq.training.job import control_channel
from megatron_lightseq.training.job.control_channel import ControlChannel
from megatron_lightseq.training.job.failure import EXIT_PEER_FAILED, TRAIN, FaultLimits

LIMITS = FaultLimits(
    beat_s=0.2,
    silence_s=4.0,
    suspect_silence_s=2.0,
    blame_s=10.0,
    grace_s=1.0,
    step_floor_s=8.0,
    setup_s=30.0,
)
FAULT_STEP = 20


def commit(fault: str) -> None:
    """Inject the fault into this process."""
    if fault == "raise":
        raise ValueError("the disk of rank is gone\nwith details")
    if fault == "exit":
        os._exit(9)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "sleep":
        time.sleep(1000)


def hold_up() -> None:
    """Delay this process between two checks of whether all ranks have finished, as a busy core would."""
    wait = control_channel.wait_until

    def late(condition: Callable[[], bool], timeout_s: float) -> bool:
        return condition() or (
            time.sleep(6.0) or wait(condition, timeout_s)
        )  # the processes of the others have ended by then

    control_channel.wait_until = late  # type: ignore[attr-defined]


def main(fault: str, culprit: int) -> int:
    """Run all-reduces under a guarded control channel. Returns the exit code."""
    faulthandler.dump_traceback_later(70, exit=True)  # if it hangs anyway, print where
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://"))
    host, port = store.host, store.port

    def connect() -> dist.Store:
        timeout = datetime.timedelta(seconds=5)
        client = dist.TCPStore(host, port, None, False, timeout=timeout, wait_for_workers=False)
        return dist.PrefixStore("control", client)

    dist.init_process_group("gloo", store=dist.PrefixStore("pg", store), rank=rank, world_size=world_size)
    channel = ControlChannel(connect, rank=rank, world_size=world_size, limits=LIMITS)
    channel.start()
    if fault == "late" and rank == culprit:
        hold_up()
    try:
        with channel.guard():
            for step in range(1, FAULT_STEP + (10 if fault in ("nothing", "late") else 100_000)):
                channel.enter(step, TRAIN)
                if step == FAULT_STEP and rank == culprit:
                    print(f"fault at {time.time()}", flush=True)
                    commit(fault)
                dist.all_reduce(torch.ones(1000))
                time.sleep(0.02)
    except PeerFailureError as error:
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_PEER_FAILED)
    except Exception as error:  # noqa: BLE001 - exit on any failure
        print(f"rank {rank}: own {error}", file=sys.stderr, flush=True)
        os._exit(1)  # tearing down a process group without its peers may hang interpreter shutdown
    if fault == "late" and rank != culprit:
        time.sleep(1.0)  # the others finish between the two checks
    channel.finish()
    dist.destroy_process_group()
    channel.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
