"""Neighbours: ranks of a copy that are processes of one machine, connected for messages through shared memory."""

import hashlib
import os
import resource
import secrets
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hetermoe_cli.runtime.machine.peers import TIMEOUT, PeerLost, peer_errors
from hetermoe_cli.runtime.machine.shared_memory import Inbox, Outbox

_BOOT, _NETWORK = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
_USERS = Path("/proc/self/ns/user")
_HELLO = struct.Struct("=qq")  # the connecting process, and which of its sockets to us this is
_CREDENTIALS = struct.Struct("=iii")  # process, user, group
_TIMEVAL = struct.Struct("@ll")


class Mail(NamedTuple):
    """Messages of one direction: this rank's, and those of the others by rank."""

    outbox: Outbox
    inboxes: dict[int, Inbox]

    def room(self, like: Tensor) -> Tensor:
        """[n] elements like those of `like` [n], to write and `show`."""
        return self.outbox.room(like.numel() * like.element_size()).view(like.dtype)

    def show(self, rank: int, part: Tensor) -> None:
        """Let `rank` read a part of a room."""
        self.outbox.send(rank, self.outbox.place(part), part.numel() * part.element_size(), b"", 0.0, 0.0)

    def shown(self, rank: int, like: Tensor) -> Tensor:
        """[n] what `rank` shows next, elements like those of `like` [n]: in its room."""
        return self.inboxes[rank].receive().rows.view(like.dtype)


def connect(processes: Sequence[int], directions: int, *, shares: bool) -> list[Mail]:
    """Collective over all processes: the mail of every direction with the other ranks of this copy, whose `processes`
    they are; none unless all of them are on one machine and say that they can share memory.

    PeerLost if one is gone.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, _socket_errors():
        token = secrets.randbits(62)
        listener.bind(_address(token))
        listener.listen(len(processes) * 2 * directions)
        listener.settimeout(TIMEOUT.total_seconds())
        everyone = _all_gather([_machine() if shares else secrets.randbits(62), token])  # and all of them listen
        me = dist.get_rank()
        if any(everyone[process][0] != everyone[me][0] for process in processes):
            return []
        others = [process for process in processes if process != me]
        ways = range(2 * directions)  # from the lower process to the higher, and back
        higher = [(other, way) for other in others if other > me for way in ways]
        sockets = {(other, way): _connected(everyone[other][1], me, way) for other, way in higher}
        while len(sockets) < len(others) * len(ways):
            if (accepted := _accepted(listener)) is not None:
                sockets[accepted[0], accepted[1]] = accepted[2]
    _allow_open_files()
    result = []
    for direction in range(directions):
        ends = {
            processes.index(other): [sockets[other, 2 * direction + way] for way in ((0, 1) if me < other else (1, 0))]
            for other in others
        }
        inboxes = {rank: Inbox(here, rank) for rank, (_, here) in ends.items()}
        result.append(Mail(Outbox({rank: there for rank, (there, _) in ends.items()}), inboxes))
    return result


def _allow_open_files() -> None:
    """As many as may be: every room is two here (its mapping keeps one), and one at each of its readers."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _socket_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PeerLost(f"lost a peer: it could not be reached on this machine ({error})") from error


def _machine() -> int:
    """What processes that can reach each other in this way have in common. Nodes of a launcher count as machines."""
    if not (hasattr(os, "memfd_create") and _BOOT.exists()):
        return secrets.randbits(62)
    spaces = [path.stat().st_ino for path in (_NETWORK, _USERS)]
    key = f"{_BOOT.read_text()} {spaces} {os.getuid()} {os.environ.get('GROUP_RANK', '')}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


def _all_gather(values: Sequence[int]) -> list[list[int]]:
    found = [torch.zeros(len(values), dtype=torch.int64) for _ in range(dist.get_world_size())]
    with peer_errors():
        dist.all_gather(found, torch.tensor(values, dtype=torch.int64))
    return [one.tolist() for one in found]


def _address(token: int) -> str:
    """In the abstract name space: nothing lies in a folder, and the name goes with the socket."""
    return f"\0hetermoe-{token:x}"


def _connected(token: int, me: int, way: int) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(_address(token))
    connection.send(_HELLO.pack(me, way))
    return _patient(connection)


def _accepted(listener: socket.socket) -> tuple[int, int, socket.socket] | None:
    """The process at the other end, which of its sockets it is, and our end; None if it is another user's."""
    connection, _ = listener.accept()
    size = _CREDENTIALS.size
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if user != os.getuid():
        connection.close()
        return None
    hello = _patient(connection).recv(_HELLO.size)
    if len(hello) < _HELLO.size:
        raise ConnectionResetError("it ended before it said who it is")
    process, way = _HELLO.unpack(hello)
    return process, way, connection


def _patient(connection: socket.socket) -> socket.socket:
    """It waits for a message as long as a process group does; the system counts, so that a wait is one call."""
    connection.settimeout(None)
    seconds = _TIMEVAL.pack(int(TIMEOUT.total_seconds()), 0)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, seconds)
    return connection
