"""A static rendezvous of the nodes of a run, around a store that listens at one address only: node 0's, or that of the
node that has taken its place.

torch's own back ends open their store on every interface, whatever address they are given.
"""

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from math import inf

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
_LOOK_SECONDS = 2.0  # between two looks at where the other nodes were
_SETTLE_SECONDS = 3.0  # longer than such a look takes


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
    began, looked, address = time.monotonic(), -inf, _address(place, succession)
    while True:
        now = time.monotonic()
        if succession and now - looked >= _LOOK_SECONDS:
            if found := _found(place, succession, succession.hosts):
                return found
            looked = now
        if place.node == 0:
            place, listener = _own_listener(place, address, succession)
            return place, _lead(listener, succession)
        reason = _silent(address, place.port)
        if not reason:
            try:
                return place, _connect(address, place.port)
            except RuntimeError as error:  # it has closed since
                raise PeerFailure(f"node 0: {GONE}", ExitCode.WORKER_DIED) from error
        if succession and succession.may_lead(place.node, now - began):
            own = replace(place, leader=place.node, host=succession.hosts[place.node])
            with contextlib.suppress(UserError):  # this machine may have another address now
                return _settled(own, _lead(_listen(own, own.host), succession), succession)
        _refuse_to_wait(place, succession, now - began, reason)
        time.sleep(_POLL_SECONDS)


def _address(place: Place, succession: Succession | None) -> str:
    """Of node 0; nothing where its name went with it, and another node may take its place."""
    try:
        return resolve(place.host)
    except UserError:
        if succession and succession.hosts and place.node:
            return ""
        raise


def _found(place: Place, succession: Succession, nodes: Iterable[int]) -> tuple[Place, TCPStore] | None:
    """The store of this run that one of `nodes` holds, another one than this, if one does."""
    for other, host in succession.answering([node for node in nodes if node != place.node], place.port):
        if store := _store_of(succession.run, host, place.port):
            return replace(place, leader=other, host=host), store
    return None


def _settled(place: Place, store: TCPStore, succession: Succession) -> tuple[Place, TCPStore]:
    """Of two that took node 0's place at the same moment, as neither saw the other, the first node leads."""
    time.sleep(_SETTLE_SECONDS)
    elsewhere = [node for node in range(place.node) if succession.hosts.get(node) != place.host]
    return _found(place, succession, elsewhere) or (place, store)


def _store_of(run: str, host: str, port: int) -> TCPStore | None:
    """The store that listens there, if it is one of this run: a port may have gone to another since, which torch's
    client would wait for without end."""
    found: list[TCPStore] = []

    def ask() -> None:
        deadline = time.monotonic() + _CONNECT_SECONDS
        with contextlib.suppress(RuntimeError):
            store = _connect(host, port)
            while not store.check([_RUN_KEY]) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            found.extend([store] if store.check([_RUN_KEY]) and store.get(_RUN_KEY).decode() == run else [])

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_CONNECT_SECONDS)
    return found[0] if found else None


def _connect(address: str, port: int) -> TCPStore:
    return TCPStore(address, port, None, False, _TIMEOUT, wait_for_workers=False)


def _own_listener(place: Place, address: str, succession: Succession | None) -> tuple[Place, socket.socket]:
    """Node 0's: at the address that was asked for, which may be that of a node 0 before it, or where it was before."""
    try:
        return place, _listen(place, address)
    except UserError:
        before = succession.hosts.get(0, address) if succession else address
        if before == address:
            raise
        with contextlib.suppress(UserError):
            return replace(place, host=before), _listen(place, before)
        raise


def _lead(listener: socket.socket, succession: Succession | None) -> TCPStore:
    address, port = listener.getsockname()
    store = TCPStore(address, port, None, True, _TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach())
    if succession:
        store.set(_RUN_KEY, succession.run)
    return store


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
        where = f"node {place.node} cannot listen at {place.host}:{place.port}"
        raise UserError(f"{where} ({reason}): {remedy}") from error
    listener.listen(1024)
    return listener


def _silent(address: str, port: int) -> str:
    """Why nobody answers there, nothing where somebody does: torch's client would write warnings and hear no Ctrl-C
    while it waits."""
    if not address:
        return "unknown name"
    try:
        with socket.create_connection((address, port), _CONNECT_SECONDS):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _refuse_to_wait(place: Place, succession: Succession | None, waited: float, reason: str) -> None:
    """UserError once a node has waited too long for what will not come."""
    turn = succession.turn(place.node) if succession else None
    if waited > max(_PATIENCE_SECONDS, 0.0 if turn is None else 2 * turn):
        raise UserError(
            f"node {place.node}: no answer from node 0 at {place.host}:{place.port} in {waited:.0f} s "
            f"({reason}): start it there, or correct --master-addr and --master-port",
            ExitCode.WORKER_DIED,
        )
