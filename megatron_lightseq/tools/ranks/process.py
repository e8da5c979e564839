"""The process of one rank: its log, network namespace and exit status. Does not import torch by itself."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from megatron_lightseq.tools.ranks.rank_context import RankContext

OUT_OF_MEMORY = 3
"""Exit status of a rank that exceeded its memory budget."""
_CLONE_NEWNET = 0x40000000


def main(task: str, context: RankContext, network_namespace: str | None, interface: str) -> None:
    """Run ``task`` on the request in ``context.folder``. Writes rank<N>.log and, on success, rank<N>.json there.

    Ends the process with exit status 0 on success, OUT_OF_MEMORY if the memory budget was exceeded, else 1.

    Args:
        task: ``package.module:function``, called with the text of the request and ``context``; its result is written as
            JSON.
        context: Of this rank.
        network_namespace: Network namespace to enter first; None to stay in the current one.
        interface: Network interface for gloo.
    """
    _redirect_output(Path(context.folder, f"rank{context.rank}.log"))
    try:
        if network_namespace is not None:
            enter_network_namespace(network_namespace)
        if Path("/sys/class/net").is_dir():
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        module, _, function = task.partition(":")
        answer = getattr(importlib.import_module(module), function)(
            Path(context.folder, "request").read_text(), context
        )
        Path(context.folder, f"rank{context.rank}.json").write_text(json.dumps(answer))
        status = 0
    except BaseException as error:  # noqa: BLE001 - any failure is reported through the log and the exit status
        traceback.print_exc()
        status = OUT_OF_MEMORY if is_out_of_memory(error) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # destructors of process groups would wait for peers that have failed


def _redirect_output(log: Path) -> None:
    with log.open("wb") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)


def enter_network_namespace(name: str) -> None:
    """Move this process into the network namespace ``name``; needs root. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open() as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"setns to network namespace {name}: {os.strerror(error)}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory could not be allocated."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        phrase in text for phrase in ("not enough memory", "out of memory", "cannot allocate memory")
    )
