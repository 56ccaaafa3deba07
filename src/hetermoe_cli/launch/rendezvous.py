"""A static rendezvous of the nodes of a run, around a store that listens at one address only.

torch's own back ends open their store on every interface, whatever address they are given.
"""

import errno
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.ends import GONE, PeerFailure
from hetermoe_cli.launch.interfaces import resolve
from hetermoe_cli.launch.place import Place

RUN_ID = "run"
_TIMEOUT = timedelta(minutes=5)
_PATIENCE_SECONDS = 600.0  # for node 0 to be started
_CONNECT_SECONDS = 5.0
_POLL_SECONDS = 0.5


class StaticRendezvous(RendezvousHandler):
    """Every launcher's node is given, there is one round: node 0's store serves launchers and workers.

    `watch` is called again and again while workers run; what it raises ends them.
    """

    def __init__(self, place: Place, store: TCPStore, watch: Callable[[], None]) -> None:
        self._place, self._store, self._watch = place, store, watch

    def get_backend(self) -> str:
        """Name of this back end."""
        return "hetermoe-static"

    @property
    def use_agent_store(self) -> bool:
        """Workers connect to the launchers' store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """This node's place among all."""
        info = RendezvousStoreInfo(self._store.host, self._store.port)
        return RendezvousInfo(PrefixStore(RUN_ID, self._store), self._place.node, self._place.nodes, info)

    def is_closed(self) -> bool:
        """Never closed early."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """No other node ever joins."""
        self._watch()
        return 0

    def get_run_id(self) -> str:
        """The launcher's run id."""
        return RUN_ID

    def shutdown(self) -> bool:
        """The store dies with the launcher of node 0."""
        return True


def open_store(place: Place) -> TCPStore:
    """Node 0 listens at its address, the others connect to it; UserError if that cannot be, or nobody listens."""
    address = resolve(place.host)
    if place.node == 0:
        listener = _listen(place, address)
        port = int(listener.getsockname()[1])
        return TCPStore(address, port, None, True, _TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach())
    _await_listener(place, address)
    try:
        return TCPStore(address, place.port, None, False, _TIMEOUT, wait_for_workers=False)
    except RuntimeError as error:  # it has closed since
        raise PeerFailure(f"node 0: {GONE}", ExitCode.WORKER_DIED) from error


def _listen(place: Place, address: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run may follow another at once
    try:
        listener.bind((address, place.port))
    except OSError as error:
        listener.close()
        remedy = {
            errno.EADDRINUSE: "another run has this port: pass another --master-port on all nodes",
            errno.EADDRNOTAVAIL: "not an address of this machine: pass that of node 0 on all nodes",
        }.get(error.errno or 0, "pass another --master-addr or --master-port on all nodes")
        reason = os.strerror(error.errno or 0)
        raise UserError(f"node 0 cannot listen at {place.host}:{place.port} ({reason}): {remedy}") from error
    listener.listen(1024)
    return listener


def _await_listener(place: Place, address: str) -> None:
    """Until node 0 listens: torch's client would write warnings and hear no Ctrl-C meanwhile."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            with socket.create_connection((address, place.port), _CONNECT_SECONDS):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or str(error)
                raise UserError(
                    f"node {place.node}: no answer from node 0 at {place.host}:{place.port} in "
                    f"{_PATIENCE_SECONDS:.0f} s ({reason}): start it there, or correct --master-addr and --master-port",
                    ExitCode.WORKER_DIED,
                ) from error
        time.sleep(_POLL_SECONDS)
