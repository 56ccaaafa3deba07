"""Messages in shared memory: what was written is what is read, for as long as anybody refers to it."""

import socket

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hetermoe_cli.runtime.machine import shared_memory as module
from hetermoe_cli.runtime.machine.peers import PeerLost
from hetermoe_cli.runtime.machine.shared_memory import Inbox, Outbox


class Pair:
    """Rank 0's outbox, and the inboxes of `readers` others, all in this process."""

    def __init__(self, readers: int = 1) -> None:
        ends = {rank: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for rank in range(1, readers + 1)}
        self.sockets = ends
        self.outbox = Outbox({rank: here for rank, (here, _) in ends.items()})
        self.inboxes = {rank: Inbox(there, 0) for rank, (_, there) in ends.items()}

    def write(self, values: Tensor) -> Tensor:
        """A room with `values` in it."""
        size = values.numel() * values.element_size()
        return self.outbox.room(size).view(values.dtype).copy_(values)

    def send(self, rows: Tensor, peer: int = 1, note: bytes = b"") -> None:
        size = rows.numel() * rows.element_size()
        self.outbox.send(peer, self.outbox.place(rows), size, note, 1.5, 2.5)


def test_a_message_brings_rows_note_and_times() -> None:
    pair, values = Pair(), torch.arange(1000.0)
    pair.send(pair.write(values)[10:20], note=b"note")
    found = pair.inboxes[1].receive()
    assert (found.note, found.start, found.end) == (b"note", 1.5, 2.5)
    assert torch.equal(found.rows.view(torch.float32), values[10:20])


def test_nothing_but_a_note_needs_no_room() -> None:
    pair = Pair()
    pair.outbox.send(1, None, 0, b"none", 0.0, 0.0)
    found = pair.inboxes[1].receive()
    assert (len(found.rows), found.note) == (0, b"none")


def test_what_is_elsewhere_has_no_place() -> None:
    pair = Pair()
    rows = pair.write(torch.zeros(4))
    assert pair.outbox.place(torch.zeros(4)) is None
    place = pair.outbox.place(rows[1:])
    assert place is not None
    assert place.offset == 4


def address(rows: Tensor) -> int:
    return rows.untyped_storage().data_ptr()


def test_a_room_is_used_again_when_nobody_refers_to_it_on_either_side() -> None:
    pair = Pair()
    first = pair.write(torch.ones(8))
    pair.send(first)
    where = address(first)
    assert address(pair.write(torch.zeros(8))) != where  # the sender still has it
    del first
    got = pair.inboxes[1].receive().rows
    assert address(pair.write(torch.zeros(8))) != where  # the reader is not done
    part = got.view(torch.float32)[2:3]
    del got
    pair.send(pair.write(torch.zeros(8)))
    pair.inboxes[1].receive()
    assert address(pair.write(torch.zeros(8))) != where  # a view of a view is left
    assert part.item() == 1
    del part
    pair.send(pair.write(torch.zeros(8)))
    pair.inboxes[1].receive()
    assert where in {address(room) for room in [pair.write(torch.zeros(8)) for _ in range(3)]}


def test_every_reader_must_be_done() -> None:
    pair = Pair(readers=2)
    rows = pair.write(torch.arange(4.0))
    where = address(rows)
    for peer in (1, 2):
        pair.send(rows[2 * peer - 2 : 2 * peer], peer)
    del rows
    seen = [pair.inboxes[peer].receive().rows.view(torch.float32).tolist() for peer in (1, 2)]
    assert seen == [[0, 1], [2, 3]]
    pair.outbox.send(1, None, 0, b"", 0, 0)
    pair.inboxes[1].receive()
    assert address(pair.outbox.room(16)) != where
    pair.outbox.send(2, None, 0, b"", 0, 0)
    pair.inboxes[2].receive()
    assert where in {address(room) for room in [pair.outbox.room(16) for _ in range(2)]}


def test_a_larger_message_gets_a_larger_room_which_the_reader_maps_anew() -> None:
    pair, large = Pair(), torch.arange(2.0**18)
    for values in (torch.ones(4), large, torch.full((4,), 7.0)):
        pair.send(pair.write(values))
        found = pair.inboxes[1].receive().rows.view(torch.float32).clone()
        assert torch.equal(found, values)
        pair.outbox.send(1, None, 0, b"", 0, 0)
        pair.inboxes[1].receive()
    assert len(pair.outbox._rooms) == 1


@given(st.lists(st.tuples(st.integers(1, 40000), st.booleans(), st.integers(0, 3)), max_size=30))
def test_what_is_kept_never_changes(messages: list[tuple[int, bool, int]]) -> None:
    """(elements, whether the sender writes before the last message was read, reads that the reader keeps it for)."""
    pair, kept, sent = Pair(), list[tuple[int, Tensor, int]](), list[tuple[int, int, int]]()

    def read() -> None:
        value, size, reads = sent.pop(0)
        rows = pair.inboxes[1].receive().rows.view(torch.int64)
        assert len(rows) == size
        kept.append((value, rows, reads))
        for number, view, _ in kept:
            assert (view == number).all()
        kept[:] = [(number, view, left - 1) for number, view, left in kept if left]

    for value, (size, ahead, reads) in enumerate(messages):
        pair.send(pair.write(torch.full((size,), value)))
        sent.append((value, size, reads))
        if not ahead:
            read()
    while sent:
        read()


def test_what_a_sender_had_sent_is_read_after_its_end() -> None:
    """It ends before it has read that its earlier message was done with."""
    pair = Pair()
    pair.send(pair.write(torch.ones(4)))
    pair.inboxes[1].receive()
    pair.send(pair.write(torch.full((4,), 2.0)), note=b"last")
    pair.inboxes[1].release()
    pair.sockets[1][0].close()
    found = pair.inboxes[1].receive()
    assert (found.note, found.rows.view(torch.float32).tolist()) == (b"last", [2.0] * 4)
    with pytest.raises(PeerLost, match="nothing comes from rank 0"):
        pair.inboxes[1].receive()


def test_a_message_whose_room_cannot_be_opened_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    pair.send(pair.write(torch.ones(4)))
    monkeypatch.setattr(module, "_DESCRIPTOR_SPACE", 0)
    with pytest.raises(PeerLost, match="did not come whole"):
        pair.inboxes[1].receive()


def test_a_peer_that_is_gone() -> None:
    pair = Pair()
    rows = pair.write(torch.zeros(4))
    pair.send(rows)
    pair.sockets[1][1].close()
    with pytest.raises(PeerLost, match="rank 1 is gone"):
        pair.send(rows)
    other = Pair()
    other.sockets[1][0].close()
    with pytest.raises(PeerLost, match="nothing comes from rank 0"):
        other.inboxes[1].receive()


def test_who_has_ended_frees_what_it_was_to_read_and_the_others_go_on() -> None:
    """The last messages of a run: a rank may end before those that still tell each other their new weights."""
    pair = Pair(readers=2)
    rows = pair.write(torch.zeros(4))
    where = address(rows)
    for peer in (1, 2):
        pair.send(rows, peer)
    del rows
    pair.inboxes[2].receive()
    pair.inboxes[2].release()
    pair.sockets[1][1].close()
    again = pair.write(torch.ones(4))
    assert address(again) == where
    pair.send(again, 2)
    assert pair.inboxes[2].receive().rows.view(torch.float32).tolist() == [1.0] * 4
