"""schedule/action.py: the text form of a task, and what it says of transfers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Action, Kind, Pass, parse_action

ACTIONS = st.builds(Action, st.sampled_from(Kind), st.sampled_from(Pass), st.integers(0, 999), st.integers(0, 999))
ROWS = ACTIONS.filter(lambda action: action.kind in (Kind.DISPATCH, Kind.COMBINE))


@given(ACTIONS)
def test_text_round_trip(action: Action) -> None:
    again = parse_action(str(action))
    assert again == action
    assert (type(again.kind), type(again.direction)) == (Kind, Pass)


@given(ACTIONS, ACTIONS)
def test_different_actions_print_differently(one: Action, other: Action) -> None:
    assert (str(one) == str(other)) == (one == other)


def test_the_text_form_is_layer_kind_pass_micro_batch() -> None:
    assert str(Action(Kind.ATTENTION, Pass.FORWARD, 3, 1)) == "3AF1"
    assert str(Action(Kind.HEAD, Pass.BACKWARD, micro_batch=12)) == "0HB12"
    assert parse_action("10DB2") == Action(Kind.DISPATCH, Pass.BACKWARD, 10, 2)


@pytest.mark.parametrize("text", ["", "AF1", "3AF", "3ZF1", "3AZ1", "-3AF1", "3AF1 ", "3AF1x", "3aF1", "3.0AF1"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no action; expected the form 3AF1"):
        parse_action(text)


def test_an_action_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Action(Kind.ATTENTION, Pass.FORWARD).layer = 1  # type: ignore[misc]


@pytest.mark.parametrize(("text", "towards"), [("0DF0", True), ("0CF0", False), ("0CB0", True), ("0DB0", False)])
def test_direction_of_transfers(text: str, towards: bool) -> None:
    assert parse_action(text).is_transfer
    assert parse_action(text).towards_experts is towards
    assert parse_action(text).lane == (1 if towards else 2)


def test_rows_gradients_and_weights_are_transferred() -> None:
    transfers = {kind for kind in Kind if Action(kind, Pass.FORWARD).is_transfer}
    assert transfers == {Kind.DISPATCH, Kind.COMBINE, Kind.CROSS, Kind.REDUCE, Kind.GATHER}
    assert {parse_action(text).lane for text in ("3RB7", "3GF7", "3GB7")} == {3}
    assert [parse_action(text).lane for text in ("3XF7", "3XB7")] == [4, 5]
    assert {parse_action(text).lane for text in ("0AF0", "0EB0", "2PF0", "0HB0", "0SB0", "0OB0")} == {0}


@given(ROWS)
def test_an_answer_goes_the_other_way_and_back(transfer: Action) -> None:
    answer = transfer.answer
    assert answer.is_transfer
    assert answer.towards_experts is not transfer.towards_experts
    assert answer[1:] == transfer[1:]
    assert answer.answer == transfer
