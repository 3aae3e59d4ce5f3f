"""The meeting of torch's elastic launcher with itself: one agent on one host, and a store that listens on loopback only.

Torch's own rendezvous of this kind opens its stores on every interface of the host.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import Store
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

from lss.meeting import host_store, listen


class OneHost(RendezvousHandler):
    """An agent that has no others to wait for. Each round, so each restart of the ranks, gets a new, empty store."""

    def __init__(self, run_id: str) -> None:
        self._run_id, self._closed = run_id, False
        self._store: Store | None = None

    def get_backend(self) -> str:
        """The name it is registered by."""
        return "lss"

    @property
    def use_agent_store(self) -> bool:
        """The ranks use the agent's store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Open a store at a port that the system picks."""
        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        self._store = host_store(listener, timedelta(minutes=5))
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", port))

    def is_closed(self) -> bool:
        """Whether the run has ended."""
        return self._closed

    def set_closed(self) -> None:
        """End the run."""
        self._closed = True

    def num_nodes_waiting(self) -> int:
        """Other agents that want to join: there are none."""
        return 0

    def get_run_id(self) -> str:
        """The run's name."""
        return self._run_id

    def shutdown(self) -> bool:
        """End the run; the store ends with its last reference."""
        self._closed, self._store = True, None
        return True


def one_host(parameters: RendezvousParameters) -> OneHost:
    """What torch's registry of rendezvous makes it by."""
    return OneHost(parameters.run_id)
