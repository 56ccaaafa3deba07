"""DirectLane: a rank's messages go in the schedule's order whatever is put first, and are told apart by it."""

import socket
from types import SimpleNamespace
from typing import Any

import torch

from hetermoe_cli.runtime.machine.neighbours import Mail
from hetermoe_cli.runtime.machine.shared_memory import Inbox, Outbox
from hetermoe_cli.runtime.step.direct import DirectLane
from hetermoe_cli.schedule.action import parse_action
from hetermoe_cli.schedule.schedule import Schedule

ORDER = [parse_action(text) for text in ("0CF0", "0CF1", "0CF2")]
WIDTH = 4


class Carrier:
    """Of rank 0, which gets two rows in every transfer from each of the others."""

    def empty(self, action: Any) -> torch.Tensor:
        return torch.empty(0, WIDTH)

    def incoming(self, action: Any) -> list[int]:
        return [0, 2, 2]


class Clock:
    """Counts its marks; keeps what was transferred."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, list[tuple[str, float, float]]()

    def mark(self) -> float:
        self.now += 1
        return self.now

    def transferred(self, action: Any, handoff: Any) -> None:
        self.done.append((str(action), handoff.start, handoff.end))


def lanes() -> tuple[list[DirectLane], list[Clock]]:
    """Ranks 1 and 2 send to rank 0."""
    pairs = {rank: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for rank in (1, 2)}
    schedule = Schedule(((), (), ()), tuple(ORDER), dict.fromkeys(ORDER, (1, 2)), dict.fromkeys(ORDER, (0,)))
    mails = [Mail(Outbox({}), {rank: Inbox(there, rank) for rank, (_, there) in pairs.items()})]
    mails += [Mail(Outbox({0: here}), {}) for here, _ in pairs.values()]
    clocks, carrier = [Clock() for _ in range(3)], Carrier()
    made = [
        DirectLane(rank, mail, schedule, ORDER[0].lane, carrier, clock)  # type: ignore[arg-type]
        for rank, (mail, clock) in enumerate(zip(mails, clocks, strict=True))
    ]
    return made, clocks


def put(lane: DirectLane, text: str, value: float, *, in_room: bool) -> None:
    action, rows = parse_action(text), torch.full((2, WIDTH), float(value))
    if in_room:
        room = lane.room(action, 2, rows)
        assert room is not None
        rows = room.copy_(rows)
    lane.put(action, rows, SimpleNamespace(sizes=[2, 0, 0]))


def test_rows_are_told_apart_by_the_order_of_the_schedule() -> None:
    (reader, *senders), clocks = lanes()
    for rank, lane in enumerate(senders, 1):
        for number, text in ((2, "0CF2"), (0, "0CF0"), (1, "0CF1")):
            put(lane, text, 10 * rank + number, in_room=rank == 1)
    for number in (1, 2, 0):  # in any order of its tasks
        handoff = reader.get(ORDER[number])
        assert handoff is not None
        assert handoff.whole()[:, 0].tolist() == [10 + number, 10 + number, 20 + number, 20 + number]
    assert [name for name, _, _ in clocks[0].done] == ["0CF1", "0CF2", "0CF0"]
    for clock in clocks[1:]:
        assert [name for name, _, _ in clock.done] == ["0CF0", "0CF1", "0CF2"]


def test_what_others_do_is_nothing_here() -> None:
    (reader, sender, _), _ = lanes()
    assert sender.get(ORDER[0]) is None
    assert reader.room(ORDER[0], 2, torch.empty(0, WIDTH)) is None
    reader.put(ORDER[0], torch.empty(0, WIDTH), None)


def test_a_transfer_lasts_until_it_is_written_or_until_a_reader_that_waited_has_it() -> None:
    (reader, *senders), clocks = lanes()
    for lane in senders:
        put(lane, "0CF0", 1.0, in_room=False)
    sent = [clock.done[0] for clock in clocks[1:]]
    reader.get(ORDER[0])  # it comes at 1 of its own clock, before they had sent it
    assert clocks[0].done[0] == ("0CF0", max(start for _, start, _ in sent), 2.0)
    for lane in senders:
        put(lane, "0CF1", 1.0, in_room=False)
    clocks[0].now = 100.0
    reader.get(ORDER[1])
    assert clocks[0].done[1][2] == max(clock.done[1][2] for clock in clocks[1:])
