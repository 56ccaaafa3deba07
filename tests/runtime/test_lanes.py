"""Lanes: who posts a transfer, and the turns that they take over one order, for a backend that wants all calls of a
rank in one (NCCL)."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hetermoe_cli.runtime.lanes import Handoff, Lanes, Moves, Turns
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
    """Rank 0 of two: it sends one dispatch after another; what a carrier would post is kept with who did it."""

    def __init__(self, ordered: bool = False) -> None:
        self.posted: list[tuple[str, bool]] = []  # action, by the compute thread
        mesh: Any = SimpleNamespace(rank=0, device=torch.device("cpu"), ordered=ordered)
        self.lanes = Lanes(mesh)
        moves = [parse_action(text) for text in ("0DF0", "0DF1", "0DF2")]
        every = dict.fromkeys(moves, (0,)), dict.fromkeys(moves, (1,))
        self.lanes.start(Schedule(((), ()), tuple(moves), *every), self.carry)

    def carry(self, action: Action, rows: torch.Tensor | None, parcel: object) -> Moves:
        assert rows is not None
        if not len(rows):
            raise ValueError("no rows")
        self.posted.append((str(action), threading.current_thread() is threading.main_thread()))
        yield []
        return Handoff(rows[:0])

    def put(self, text: str, rows: int = 1, idle: bool = True) -> None:
        self.lanes.put(parse_action(text), torch.empty(rows, 1), None, lambda: idle)

    def until_awaited(self, text: str) -> None:
        while parse_action(text) not in self.lanes._awaited:
            time.sleep(0.001)


def test_an_idle_compute_thread_posts_what_its_lane_waits_for() -> None:
    sender = Sender()
    sender.until_awaited("0DF0")
    sender.put("0DF0")
    sender.until_awaited("0DF1")
    sender.put("0DF1", idle=False)  # it has work to do meanwhile
    sender.until_awaited("0DF2")
    sender.put("0DF2")
    sender.lanes.finish()
    assert sender.posted == [("0DF0", True), ("0DF1", False), ("0DF2", True)]


def test_a_lane_posts_in_its_order_what_was_put_before_it_came_to_it() -> None:
    sender = Sender()
    sender.until_awaited("0DF0")
    for text in ("0DF2", "0DF1", "0DF0"):
        sender.put(text)
    sender.lanes.finish()
    assert sender.posted == [("0DF0", True), ("0DF1", False), ("0DF2", False)]


def test_where_lanes_take_turns_they_post_all() -> None:
    sender = Sender(ordered=True)
    for text in ("0DF0", "0DF1", "0DF2"):
        sender.until_awaited(text)
        sender.put(text)
    sender.lanes.finish()
    assert sender.posted == [(text, False) for text in ("0DF0", "0DF1", "0DF2")]


def test_a_lane_ends_with_what_the_compute_thread_could_not_post() -> None:
    sender = Sender()
    sender.until_awaited("0DF0")
    with pytest.raises(ValueError, match="no rows"):
        sender.put("0DF0", rows=0)
    with pytest.raises(ValueError, match="no rows"):
        sender.lanes.finish()
