"""Lanes take turns: one order over all of them, and nobody waits for ever when one fails."""

import threading

import pytest

from hetermoe_cli.runtime.lanes import Turns
from hetermoe_cli.schedule.action import parse_action

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
