"""A torchrun rendezvous for the ranks of one host: a store of the launcher's that only this host can reach.

torch's own rendezvous listen on all network interfaces, also where there is one host only, and the one behind
``--standalone`` reads pickles from its store: whoever reaches the port can run code in the launcher.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "one-host"
"""For torchrun's ``--rdzv-backend``, after :func:`register`."""
_LOOPBACK = "127.0.0.1"
_STORE_TIMEOUT = timedelta(minutes=5)
_BACKLOG = 1024


class OneHostRendezvous(RendezvousHandler):
    """Every attempt gets a new store, so that no restarted rank finds the addresses of one that has ended."""

    store: dist.TCPStore | None = None
    """Of the current attempt, held by this process; None before the first."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def get_backend(self) -> str:
        """See RendezvousHandler."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Yes: the ranks are clients of the store in this process."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """The store of a new attempt; the launcher's own keys have a prefix."""
        self.store = loopback_store()
        return RendezvousInfo(
            dist.PrefixStore("launcher", self.store),
            rank=0,
            world_size=1,
            bootstrap_store_info=RendezvousStoreInfo(_LOOPBACK, self.store.port),
        )

    def is_closed(self) -> bool:
        """Never."""
        return False

    def set_closed(self) -> None:
        """Nobody else could join."""

    def num_nodes_waiting(self) -> int:
        """None."""
        return 0

    def get_run_id(self) -> str:
        """See RendezvousHandler."""
        return self._run_id

    def shutdown(self) -> bool:
        """Close the store."""
        self.store = None
        return True


def loopback_store() -> dist.TCPStore:
    """A store that listens on a free port of the loopback interface only."""
    with socket.socket() as listening:
        listening.bind((_LOOPBACK, 0))
        listening.listen(_BACKLOG)
        port = listening.getsockname()[1]
        return dist.TCPStore(
            _LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=_STORE_TIMEOUT,
            master_listen_fd=listening.detach(),
        )


def register() -> None:
    """Make :data:`BACKEND` known to torchrun."""
    if BACKEND not in rendezvous_handler_registry._registry:
        rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return OneHostRendezvous(parameters.run_id)
