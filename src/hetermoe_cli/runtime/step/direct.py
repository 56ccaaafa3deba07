"""DirectLane: transfers between processes that share memory, done by the compute thread itself.

A message is there as soon as it is written, so that nothing has to be carried meanwhile: no thread takes the core from
the compute thread, and what came lies where the next task reads it.
"""

import struct
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hetermoe_cli.runtime.clocks.clock import Clock
from hetermoe_cli.runtime.machine.neighbours import Mail
from hetermoe_cli.runtime.machine.shared_memory import Message
from hetermoe_cli.runtime.step.carrier import Carrier
from hetermoe_cli.runtime.transfers.calls import has_counts
from hetermoe_cli.runtime.transfers.lanes import Handoff, Parcel
from hetermoe_cli.schedule.action import Action
from hetermoe_cli.schedule.schedule import Schedule


@dataclass
class Letters(Handoff):
    """Messages of one transfer, in the rooms of their senders until they are taken. `sizes`: rows by source rank."""

    sizes: list[int] = field(default_factory=list)
    messages: dict[int, Message] = field(default_factory=dict)
    keeps: bool = False  # who takes them keeps them for backward: not in a sender's room

    def whole(self) -> Tensor:
        """[M, H] by source; what this rank sent to itself is left out, but has its place."""
        total, (_, width) = sum(self.sizes), self.rows.shape
        messages, self.messages = self.messages, {}
        if len(messages) == 1 and not self.keeps:
            (only,) = (message.rows.view(self.rows.dtype).view(-1, width) for message in messages.values())
            if len(only) == total:
                return only
        result = self.rows.new_empty(total, width)
        for peer, part in enumerate(torch.split(result, self.sizes)):
            if peer in messages and len(part):
                part.copy_(messages[peer].rows.view(part.dtype).view(part.shape))
        return result


class _Sending(NamedTuple):
    rows: Tensor
    parcel: Parcel
    start: float


class DirectLane:
    """The transfers of one direction in one pass. Every rank sends in the schedule's order, so that all know what a
    peer's next message is."""

    def __init__(self, rank: int, mail: Mail, schedule: Schedule, lane: int, carrier: Carrier, clock: Clock) -> None:
        self._rank, self._mail, self._schedule, self._carrier, self._clock = rank, mail, schedule, carrier, clock
        mine = [action for action in schedule.transfers_of(rank) if action.lane == lane]
        self._unsent = deque(action for action in mine if rank in schedule.senders[action])
        received = [action for action in mine if rank in schedule.receivers[action]]
        self._expected = {
            peer: deque(action for action in received if peer in schedule.senders[action]) for peer in mail.inboxes
        }
        self._letters: dict[tuple[Action, int], Message] = {}
        self._ready: dict[Action, _Sending] = {}
        self._began: dict[Action, float] = {}  # when this rank sent what it also receives

    def room(self, action: Action, rows: int, like: Tensor) -> Tensor | None:
        """[rows, H] like `like` to write in what `action` will send; None if no other rank gets it."""
        if action not in self._unsent or not self._peers(self._schedule.receivers[action]):
            return None
        width = like.shape[1]
        return self._mail.outbox.room(rows * width * like.element_size()).view(like.dtype).view(rows, width)

    def put(self, action: Action, rows: Tensor, parcel: Parcel | None) -> None:
        """Send rows, and those that wait for them; nothing happens if this rank sends nothing in `action`."""
        if action not in self._unsent:
            return
        assert parcel is not None
        self._ready[action] = _Sending(rows, parcel, self._clock.mark())
        while self._unsent and self._unsent[0] in self._ready:
            action = self._unsent.popleft()
            self._send(action, self._ready.pop(action))

    def _send(self, action: Action, sending: _Sending) -> None:
        rows, parcel, start = sending
        sizes, peers, outbox = parcel.sizes, self._peers(self._schedule.receivers[action]), self._mail.outbox
        row_bytes, place = rows.shape[1] * rows.element_size(), outbox.place(rows)
        if place is None and any(sizes[peer] for peer in peers):
            room = outbox.room(sum(sizes) * row_bytes).view(rows.dtype).view(-1, rows.shape[1])
            place = outbox.place(room.copy_(rows[: sum(sizes)]))
        end = self._clock.mark()
        routing = self._carrier.departing(action) if has_counts(action) else None
        for peer in peers:
            told = routing.told(peer) if routing else []
            note = struct.pack(f"={len(told)}q", *told)
            there = place and place._replace(offset=place.offset + sum(sizes[:peer]) * row_bytes)
            outbox.send(peer, there, sizes[peer] * row_bytes, note, start, end)
        if self._rank in self._schedule.receivers[action]:
            self._began[action] = start
        else:
            self._clock.transferred(action, Handoff(self._carrier.empty(action), None, start, end))

    def release(self) -> None:
        """Let senders write again where nothing is read any more."""
        for inbox in self._mail.inboxes.values():
            inbox.release()

    def get(self, action: Action) -> Handoff | None:
        """Wait for what `action` brings to this rank; None if this rank receives nothing in it."""
        if self._rank not in self._schedule.receivers.get(action, ()):
            return None
        entered = self._clock.mark()
        messages = {peer: self._message(action, peer) for peer in self._peers(self._schedule.senders[action])}
        received = self._clock.mark()
        if has_counts(action):
            self._carrier.came(action, {peer: _counts(message.note) for peer, message in messages.items()})
        began, sent = self._began.pop(action, 0.0), max((message.end for message in messages.values()), default=0.0)
        handoff = Letters(
            rows=self._carrier.empty(action),
            start=max([began, *(message.start for message in messages.values())]),
            end=max(began, sent if sent < entered else received),  # who waited had to be woken as well
            sizes=self._carrier.incoming(action),
            messages=messages,
            keeps=has_counts(action),
        )
        self._clock.transferred(action, handoff)
        return handoff

    def _message(self, action: Action, peer: int) -> Message:
        """What `peer` sends in `action`; what it sends before that is kept."""
        while (action, peer) not in self._letters:
            self._letters[self._expected[peer].popleft(), peer] = self._mail.inboxes[peer].receive()
        return self._letters.pop((action, peer))

    def _peers(self, ranks: tuple[int, ...]) -> list[int]:
        return [rank for rank in ranks if rank != self._rank]


def _counts(note: bytes) -> list[int]:
    return list(struct.unpack(f"={len(note) // 8}q", note))
