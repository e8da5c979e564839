"""`lightseq pretrain` with a fault at an exact place; started under torchrun in place of the package.

Everything runs as in production up to that place: hooks only look, until the fault's own moment.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron_lightseq.training.job.exit import CleanExit
from megatron_lightseq.training.job.launch import Launch, end_with_launcher
from tests.chaos import faults
from tests.chaos.faults import Fault

_SMALL_FILE = 512
"""Bytes; a file size limit that the files of a checkpoint exceed."""


class Injector:
    """Counts its way to the place of the fault."""

    def __init__(self, fault: Fault, record: Path) -> None:
        self._fault = fault
        self._record = record
        self._step, self._phase = 0, ""
        self._seen = 0
        self._fired = False
        self._exchange = ""

    def install(self) -> None:
        """Hook the places that the fault may be at."""
        from megatron_lightseq.megatron.lazy_compile import import_megatron

        import_megatron()
        from megatron_lightseq.attention.stats import Place
        from megatron_lightseq.training.health import guard
        from megatron_lightseq.training.job.control_channel import ControlChannel

        enter, finish = ControlChannel.enter, guard.finish_step
        exchange, leave = Place.enter, Place.leave

        def entered(channel: Any, step: int, phase: str) -> None:
            missed = self._phase == "save" and self._fault.place == faults.SAVE
            if missed and self._step == self._fault.step:  # fewer file operations than the plan thought
                self._fire()
            enter(channel, step, phase)
            self._step, self._phase = step, phase
            self._seen, self._exchange = 0, ""
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            names = {"train": faults.STEP, "save": faults.SAVE}
            self.at(names.get(phase, phase), repeats=phase == "train")

        def exchanged(place: Any, direction: Any, step: int, num_steps: int) -> None:
            exchange(place, direction, step, num_steps)
            self._exchange = f"{direction} exchange {step + 1} of {num_steps}, layer {place.layer}"
            self.at(str(direction), counts=True)

        def left(place: Any) -> None:
            leave(place)
            self._exchange = ""

        def finished(*arguments: Any, **settings: Any) -> Any:
            self.at(faults.OPTIMIZER)
            return finish(*arguments, **settings)

        ControlChannel.enter = entered  # type: ignore[method-assign]
        Place.enter = exchanged  # type: ignore[method-assign]
        Place.leave = left  # type: ignore[method-assign]
        guard.finish_step = finished
        if self._fault.place == faults.SAVE:
            self._watch_files()
        if self._fault.kind == faults.FLIP:
            self._watch_messages()

    def _watch_files(self) -> None:
        fsync = os.fsync

        def synced(descriptor: int) -> None:
            self.operation()
            fsync(descriptor)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            writes = (
                event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if writes or event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove"):
                self.operation()

        os.fsync = synced
        sys.addaudithook(hook)

    def operation(self) -> None:
        """A file is opened to be written, synced, renamed or removed."""
        if self._phase == "save":
            self._seen += 1
            if self._seen == self._fault.number + 1 and self._step == self._fault.step:
                self._fire()

    def _watch_messages(self) -> None:
        """Spoil a received message after it has arrived: as memory or a network card would."""
        from megatron_lightseq.transport import p2p

        wait = p2p._Works.wait
        start = p2p.P2PTransport.start
        received: dict[int, Any] = {}

        def started(transport: Any, sends: Any, receives: Any) -> Any:
            works = start(transport, sends, receives)
            received[id(works)] = receives
            return works

        def waited(works: Any) -> None:
            wait(works)
            for message in received.pop(id(works), ()):
                if self._due() and not self._fired and message.tensor.numel() > 1:
                    self._fired = True
                    self._write_down()
                    message.tensor.view(-1).view(dtype=_integers(message.tensor))[0] ^= 1 << 20

        p2p.P2PTransport.start = started  # type: ignore[method-assign]
        p2p._Works.wait = waited  # type: ignore[method-assign]

    def at(self, place: str, *, counts: bool = False, repeats: bool = False) -> None:
        """This rank is at a place of its present step."""
        fault = self._fault
        if fault.kind == faults.SLOW:
            if repeats and self._step >= fault.step:
                self._write_down()
                time.sleep(fault.seconds)
            return
        if fault.kind == faults.FLIP or self._step != fault.step:
            return
        if place == faults.OPTIMIZER and fault.place in (faults.FORWARD, faults.BACKWARD):
            self._fire()  # fewer exchanges than the plan thought
        if place != fault.place:
            return
        if place == faults.SAVE:  # the file operations decide
            return
        self._seen += 1
        if not counts or self._seen == fault.number + 1:
            self._fire()

    def _due(self) -> bool:
        return self._phase == "train" and self._step == self._fault.step

    def _fire(self) -> None:
        if self._fired:
            return
        self._fired = True
        self._write_down()
        act(self._fault)

    def _write_down(self) -> None:
        if self._record.exists():
            return
        entry = {"time": time.time(), "step": self._step, "phase": self._phase, "exchange": self._exchange}
        temporary = self._record.with_suffix(".part")
        temporary.write_text(json.dumps({**entry, "pid": os.getpid()}))
        os.replace(temporary, self._record)


def act(fault: Fault) -> None:
    """Commit the fault."""
    if fault.kind == faults.KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == faults.STOP:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == faults.EXIT:
        os._exit(9)
    elif fault.kind == faults.RAISE:
        raise RuntimeError("a fault of the test")
    elif fault.kind == faults.HANG:
        while True:
            time.sleep(1000)
    elif fault.kind == faults.GIL:
        ctypes.PyDLL(None).sleep(1000)
    elif fault.kind == faults.DISK and fault.errno:
        raise OSError(fault.errno, os.strerror(fault.errno))
    elif fault.kind == faults.DISK:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_SMALL_FILE, resource.RLIM_INFINITY))


def _integers(tensor: Any) -> Any:
    import torch

    return {4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.element_size()]


def main() -> int:
    """As ``python -m megatron_lightseq``."""
    from megatron_lightseq.cli import run

    end = CleanExit()
    end_with_launcher()
    launch = Launch.from_environment()
    fault, record = faults.own_fault(launch.rank, launch.attempt)
    if fault is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        Injector(fault, record).install()
    end.status = run(["pretrain", *sys.argv[1:]])
    return end.status


if __name__ == "__main__":
    sys.exit(main())
