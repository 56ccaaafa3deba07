"""Lanes: the order of a lane's transfers, and the turns that lanes take over one order, for a backend that wants all
calls of a rank in one (NCCL)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hetermoe_cli.runtime.transfers.lanes import Handoff, Lanes, Turns
from hetermoe_cli.schedule.action import Action, parse_action
from hetermoe_cli.schedule.schedule import Schedule

ORDER = [parse_action(text) for text in ("0DF0", "0DF1", "0CF0", "1RB1", "0CF1")]


def test_transfers_are_called_in_the_given_order_whoever_comes_first() -> None:
    turns, called = Turns(ORDER), []

    def lane(number: int) -> None:
        for action in ORDER:
            if action.lane == number:
                with turns.turn(action):
                    called.append(action)

    threads = [threading.Thread(target=lane, args=(number,)) for number in (3, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert called == ORDER


def test_a_failure_wakes_who_waits_for_a_turn() -> None:
    turns = Turns(ORDER)
    failed: list[str] = []

    def late() -> None:
        try:
            with turns.turn(ORDER[2]):
                failed.append("ran")
        except RuntimeError as error:
            failed.append(str(error))

    thread = threading.Thread(target=late)
    thread.start()
    turns.abort()
    thread.join(10)
    assert failed == ["transfer 0CF0: another lane failed"]
    with pytest.raises(RuntimeError, match="another lane failed"), turns.turn(ORDER[0]):
        pass


class Sender:
    """Rank 0 of two: it sends one dispatch after another; what a carrier would move is kept."""

    def __init__(self, ordered: bool = False, device: str = "cpu") -> None:
        self.moved: list[str] = []
        mesh: Any = SimpleNamespace(rank=0, device=torch.device(device), ordered=ordered)
        self.lanes = Lanes(mesh)
        moves = [parse_action(text) for text in ("0DF0", "0DF1", "0DF2")]
        every = dict.fromkeys(moves, (0,)), dict.fromkeys(moves, (1,))
        self.lanes.start(Schedule(((), ()), tuple(moves), *every), self.carry, {})

    def carry(self, action: Action, rows: torch.Tensor | None, parcel: object) -> Handoff:
        assert rows is not None
        if not len(rows):
            raise ValueError("no rows")
        self.moved.append(str(action))
        return Handoff(rows[:0])

    def put(self, text: str, rows: int = 1) -> None:
        self.lanes.put(parse_action(text), torch.empty(rows, 1), None)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_lane_moves_in_its_order_whatever_is_put_first(ordered: bool) -> None:
    sender = Sender(ordered)
    for text in ("0DF2", "0DF1", "0DF0"):
        sender.put(text)
    sender.lanes.finish()
    assert sender.moved == ["0DF0", "0DF1", "0DF2"]


def test_a_lane_ends_with_what_could_not_be_moved() -> None:
    sender = Sender()
    sender.put("0DF0", rows=0)
    with pytest.raises(ValueError, match="no rows"):
        sender.lanes.finish()


def test_the_threads_of_a_rank_on_a_later_card_leave_card_0_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA has it: a thread begins on card 0, and a stream's context goes back to where it came from."""
    here = threading.local()
    left: list[int] = []

    @contextmanager
    def stream(device: int) -> Iterator[None]:
        before, here.device = getattr(here, "device", 0), device
        yield
        here.device = before
        left.append(before)

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(here, "device", device.index))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: device.index)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    sender = Sender(device="cuda:1")
    for text in ("0DF0", "0DF1", "0DF2"):
        sender.put(text)
    sender.lanes.finish()
    assert left == [1]
