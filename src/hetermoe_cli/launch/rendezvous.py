"""A static rendezvous of the nodes of a run, around a store that listens at one address only: node 0's, or that of the
node that has taken its place.

torch's own back ends open their store on every interface, whatever address they are given.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.ends import GONE, PeerFailure
from hetermoe_cli.launch.interfaces import resolve
from hetermoe_cli.launch.place import Place
from hetermoe_cli.launch.succession import Succession

RUN_ID = "run"
_RUN_KEY = "of_run"  # whose store it is
_TIMEOUT = timedelta(minutes=5)
_PATIENCE_SECONDS = 600.0  # for node 0 to be started
_CONNECT_SECONDS = 5.0
_POLL_SECONDS = 0.5


class StaticRendezvous(RendezvousHandler):
    """Every launcher's node is given, there is one round: the leader's store serves launchers and workers.

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
        """The store dies with the leader's launcher."""
        return True


def open_store(place: Place, succession: Succession | None = None) -> tuple[Place, TCPStore]:
    """Node 0 listens at its address, the others connect to it; UserError if that cannot be, or nobody listens.

    With a `succession` another node may listen in its place: which one, and where, says the place that comes back.
    """
    began = time.monotonic()
    while True:
        waited = time.monotonic() - began
        if succession and succession.may_look(place.node, waited):
            for leader, host in succession.answering(place.node, place.port):
                if store := _store_of(succession.run, host, place.port):
                    return replace(place, leader=leader, host=host), store
        if place.node == 0:
            return place, _lead(place, succession)
        if reason := _silent(place):
            if succession and succession.may_lead(place.node, waited):
                place = replace(place, leader=place.node, host=succession.hosts[place.node])
                return place, _lead(place, succession)
            _refuse_to_wait(place, succession, waited, reason)
            time.sleep(_POLL_SECONDS)
            continue
        try:
            return place, _connect(resolve(place.host), place.port)
        except RuntimeError as error:  # it has closed since
            raise PeerFailure(f"node 0: {GONE}", ExitCode.WORKER_DIED) from error


def _lead(place: Place, succession: Succession | None) -> TCPStore:
    address = resolve(place.host)
    listener = _listen(place, address)
    port = int(listener.getsockname()[1])
    store = TCPStore(address, port, None, True, _TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach())
    if succession:
        store.set(_RUN_KEY, succession.run)
    return store


def _connect(address: str, port: int) -> TCPStore:
    return TCPStore(address, port, None, False, _TIMEOUT, wait_for_workers=False)


def _store_of(run: str, host: str, port: int) -> TCPStore | None:
    """The store that listens there, if it is one of this run: a port may have gone to another since."""
    with contextlib.suppress(RuntimeError):
        store, deadline = _connect(host, port), time.monotonic() + _CONNECT_SECONDS
        while time.monotonic() < deadline:
            if store.check([_RUN_KEY]):
                return store if store.get(_RUN_KEY).decode() == run else None
            time.sleep(_POLL_SECONDS)
    return None


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


def _silent(place: Place) -> str:
    """Why nobody answers at node 0's address, nothing where somebody does: torch's client would write warnings and hear
    no Ctrl-C while it waits."""
    try:
        with socket.create_connection((resolve(place.host), place.port), _CONNECT_SECONDS):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _refuse_to_wait(place: Place, succession: Succession | None, waited: float, reason: str) -> None:
    """UserError once a node has waited too long for what will not come."""
    if waited > _PATIENCE_SECONDS and not (succession and place.node in succession.hosts):
        raise UserError(
            f"node {place.node}: no answer from node 0 at {place.host}:{place.port} in {_PATIENCE_SECONDS:.0f} s "
            f"({reason}): start it there, or correct --master-addr and --master-port",
            ExitCode.WORKER_DIED,
        )
