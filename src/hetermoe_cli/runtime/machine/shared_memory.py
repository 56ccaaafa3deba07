"""Messages between processes of one machine through memory that they share, which nobody copies.

gloo has no way but TCP, whose loopback takes seven times the processor time of two copies, in threads that take it
from the compute thread. Here a sender writes rows into a room, memory that the others map, and tells through a socket
where they lie; a receiver reads them there. A room is written again when every receiver has said that it is done and
nothing here refers to it: both sides count the references to its mapping, so that who keeps a view keeps the room. They
have no names: a room's file descriptor travels with the first message, and the system frees it with the last process.
"""

import mmap
import os
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hetermoe_cli.runtime.machine.peers import PeerLost

_HEADER = struct.Struct("=qqqdd")  # room, where in it, bytes; start and end of sending
_DONE = struct.Struct("=q")  # room
_NOTE_BYTES = 2**16
_DESCRIPTOR = struct.Struct("i")
_DESCRIPTOR_SPACE = socket.CMSG_SPACE(_DESCRIPTOR.size)
_SMALLEST = 2**16  # bytes of a room
_UNUSED = 2  # references to a mapping that no tensor refers to: ours, and the question's


class Message(NamedTuple):
    """`rows` [bytes] uint8 in the sender's room; `note`: what came with them; `start` and `end` of sending, seconds on
    the machine's monotonic clock."""

    rows: Tensor
    note: bytes
    start: float
    end: float


@dataclass
class _Room:
    number: int
    descriptor: int
    memory: mmap.mmap
    readers: set[int] = field(default_factory=set)  # who is not done with it
    known: set[int] = field(default_factory=set)  # who has mapped it

    @property
    def free(self) -> bool:
        return not self.readers and sys.getrefcount(self.memory) == _UNUSED


class Place(NamedTuple):
    """Bytes from the start of a room."""

    room: _Room
    offset: int


class Outbox:
    """This rank's rooms for messages in one direction. `connections`: a socket to each peer that keeps messages apart
    (SOCK_SEQPACKET)."""

    def __init__(self, connections: Mapping[int, socket.socket]) -> None:
        self._connections = connections
        self._rooms: list[_Room] = []
        self._by_address: dict[int, _Room] = {}

    def room(self, size: int) -> Tensor:
        """[size] uint8 to write a message in, as long as tensors refer to it."""
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        for peer in {peer for room in self._rooms for peer in room.readers}:
            self._collect(peer)
        free = [room for room in self._rooms if room.free]
        fitting = (room for room in free if len(room.memory) >= size)
        room = min(fitting, key=lambda r: len(r.memory), default=None) or self._new(free, size)
        return torch.frombuffer(room.memory, dtype=torch.uint8, count=size)

    def _new(self, free: list[_Room], size: int) -> _Room:
        """A larger room, instead of one that is too small."""
        number = free[-1].number if free else len(self._rooms)
        descriptor = os.memfd_create("hetermoe", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, max(_SMALLEST, 1 << (size - 1).bit_length()))  # pages are taken when written to
        room = _Room(number, descriptor, mmap.mmap(descriptor, 0))
        if free:
            os.close(self._rooms[number].descriptor)
        self._rooms[number : number + 1] = [room]
        self._by_address = {torch.frombuffer(r.memory, dtype=torch.uint8).data_ptr(): r for r in self._rooms}
        return room

    def place(self, rows: Tensor) -> Place | None:
        """Where `rows` lie, if they are part of a room."""
        address = rows.data_ptr()
        for start, room in self._by_address.items():
            if start <= address < start + len(room.memory):
                return Place(room, address - start)
        return None

    def send(self, peer: int, place: Place | None, size: int, note: bytes, start: float, end: float) -> None:
        """Tell `peer` of `size` bytes at `place`, which may be None if there are none; waits only
        where hundreds of messages are unread.

        PeerLost if it is gone.
        """
        number, offset, ancillary = 0, 0, []
        if size:
            assert place is not None
            room, offset = place
            number = room.number
            if peer not in room.known:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(room.descriptor))]
                room.known.add(peer)
            room.readers.add(peer)
        try:
            self._connections[peer].sendmsg([_HEADER.pack(number, offset, size, start, end), note], ancillary)
        except OSError as error:
            raise PeerLost(f"lost a peer: rank {peer} is gone ({error})") from error

    def _collect(self, peer: int) -> None:
        """Learn what a receiver is done with: everything if it is gone, be it that it has ended before this rank. Who
        still needs it notices when sending or receiving."""
        while True:
            try:
                done = self._connections[peer].recv(_DONE.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                done = b""
            finished = [self._rooms[_DONE.unpack(done)[0]]] if done else self._rooms
            for room in finished:
                room.readers.discard(peer)
            if not done:
                return


class Inbox:
    """What rank `peer` sends here in one direction, in its order."""

    def __init__(self, connection: socket.socket, peer: int) -> None:
        self._connection, self._peer = connection, peer
        self._rooms: dict[int, mmap.mmap] = {}
        self._data = bytearray(_HEADER.size + _NOTE_BYTES)
        self._read: set[int] = set()  # rooms of whose message there may be views

    def receive(self) -> Message:
        """Wait for the next message. PeerLost if the sender is gone, or silent for as long as the socket waits."""
        self.release()
        try:
            length, ancillary = self._next()
            number, offset, size, start, end = _HEADER.unpack_from(self._data)
            for _, _, data in ancillary:
                (descriptor,) = _DESCRIPTOR.unpack_from(data)
                try:
                    self._rooms[number] = mmap.mmap(descriptor, 0)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise PeerLost(f"lost a peer: nothing comes from rank {self._peer} ({error})") from error
        rows = torch.empty(0, dtype=torch.uint8)
        if size:
            self._read.add(number)
            rows = torch.frombuffer(self._rooms[number], dtype=torch.uint8, count=size, offset=offset)
        return Message(rows, bytes(self._data[_HEADER.size : length]), start, end)

    def _next(self) -> tuple[int, list[tuple[int, int, bytes]]]:
        """Length and ancillary data of the next message. OSError if none comes, or not all of it."""
        try:
            length, ancillary, flags, _ = self._connection.recvmsg_into([self._data], _DESCRIPTOR_SPACE)
        except ConnectionResetError:  # the sender has ended with something unread: what it had sent is still there
            length, ancillary, flags, _ = self._connection.recvmsg_into([self._data], _DESCRIPTOR_SPACE)
        if not length:
            raise ConnectionResetError("it is gone")
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise OSError("a message did not come whole: allow more open files (ulimit -n)")
        return length, ancillary

    def release(self) -> None:
        """Tell the sender which of its rooms nothing here refers to any more."""
        for number in [number for number in self._read if sys.getrefcount(self._rooms[number]) == _UNUSED]:
            self._read.remove(number)
            try:
                self._connection.send(_DONE.pack(number))
            except OSError:
                return  # a sender that has ended needs it no more
