"""The process around one rank: its log, its network, its exit status. Imports no torch until it must."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from megatron_lightseq.tools.ranks.rank_context import Seat

OUT_OF_MEMORY = 3
"""Exit status of a rank that hit its memory budget."""
_CLONE_NEWNET = 0x40000000


def main(task: str, seat: Seat, network_namespace: str | None, interface: str) -> None:
    """Run ``task`` on the request in ``seat.folder``; leaves rank<N>.log and, if all went well, rank<N>.json there.

    Ends the process: 0 done, OUT_OF_MEMORY beyond its budget, 1 anything else.

    Args:
        task: ``package.module:function``, called with the request's text and ``seat``; what it returns becomes JSON.
        seat: of this rank.
        network_namespace: where to go first, or None to stay.
        interface: what gloo talks through.
    """
    _redirect_output(Path(seat.folder, f"rank{seat.rank}.log"))
    try:
        if network_namespace is not None:
            enter_network_namespace(network_namespace)
        if Path("/sys/class/net").is_dir():
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        module, _, function = task.partition(":")
        answer = getattr(importlib.import_module(module), function)(
            Path(seat.folder, "request").read_text(), seat
        )
        Path(seat.folder, f"rank{seat.rank}.json").write_text(json.dumps(answer))
        status = 0
    except BaseException as error:  # noqa: BLE001 - whatever it is, the log and the status say so
        traceback.print_exc()
        status = OUT_OF_MEMORY if is_out_of_memory(error) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a rank whose peers failed would wait for them in the destructors of its process groups


def _redirect_output(log: Path) -> None:
    with log.open("wb") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)


def enter_network_namespace(name: str) -> None:
    """Give this process the network of ``ip netns`` NAME; needs root. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open() as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"setns to network namespace {name}: {os.strerror(error)}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be allocated."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        phrase in text for phrase in ("not enough memory", "out of memory", "cannot allocate memory")
    )
