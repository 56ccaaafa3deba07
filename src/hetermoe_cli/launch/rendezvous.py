"""A rendezvous for workers of one machine whose port listens on loopback only.

torch's own back ends open their store on every interface, whatever address they are given.
"""

import socket
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.api import rendezvous_handler_registry

BACKEND = "hetermoe-loopback"
_HOST = "127.0.0.1"
_TIMEOUT = timedelta(minutes=5)


class LoopbackRendezvous(RendezvousHandler):
    """One node, one round: the agent's store, bound to 127.0.0.1 on a free port, serves the workers too."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((_HOST, 0))
        listener.listen(64)
        self._port = int(listener.getsockname()[1])
        self._store = TCPStore(
            _HOST, self._port, None, True, _TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def get_backend(self) -> str:
        """Name of this back end."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Workers connect to the agent's store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Rank 0 of 1 node."""
        info = RendezvousStoreInfo(_HOST, self._port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, info)

    def is_closed(self) -> bool:
        """Never closed early."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """No other node ever joins."""
        return 0

    def get_run_id(self) -> str:
        """The launcher's run id."""
        return self._run_id

    def shutdown(self) -> bool:
        """The store dies with the agent."""
        return True


def register() -> None:
    """Make the back end known to torch's elastic launcher."""
    rendezvous_handler_registry.register(BACKEND, LoopbackRendezvous)
