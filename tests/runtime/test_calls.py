"""Derived communication calls: those of a plan fit together, and any that do not are refused with one clear line."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from builders import layouts, make_layout
from hetermoe_cli.errors import UserError
from hetermoe_cli.runtime.calls import Calls, calls_of, check_agreement, digest, verify
from hetermoe_cli.schedule.action import Action, parse_action
from hetermoe_cli.schedule.lower import training_schedule, validation_schedule
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.spec.layout import Layout


def all_calls(layout: Layout, of: Callable[[Layout], Schedule] = training_schedule) -> list[Calls]:
    schedule = of(layout)
    return [calls_of(schedule, layout, rank, "fp32") for rank in range(layout.world_size)]


def swapped(schedule: Schedule, first: Action, second: Action) -> Schedule:
    places = {first: second, second: first}
    return replace(schedule, transfers=tuple(places.get(t, t) for t in schedule.transfers))


def participants(schedule: Schedule, action: Action) -> set[int]:
    return {*schedule.senders[action], *schedule.receivers[action]}


@given(layouts(), st.sampled_from([training_schedule, validation_schedule]))
def test_the_calls_of_every_plan_fit_together(layout: Layout, of: Callable[[Layout], Schedule]) -> None:
    calls = all_calls(layout, of)
    verify(calls)
    sent = [(rank, call.peer) for rank, mine in enumerate(calls) for call in mine if call.operation == "send"]
    received = [(call.peer, rank) for rank, mine in enumerate(calls) for call in mine if call.operation == "receive"]
    assert sorted(sent) == sorted(received)
    schedule = of(layout)
    pairs = [
        (action, source, target)
        for action in schedule.transfers
        if action.lane in (1, 2)
        for source in schedule.senders[action]
        for target in schedule.receivers[action]
        if source != target
    ]
    assert sum(call.payload == "rows" and call.operation == "send" for mine in calls for call in mine) == len(pairs)


@given(layouts(), st.data())
def test_a_rank_that_swaps_two_transfers_is_refused(layout: Layout, data: st.DataObject) -> None:
    schedule = training_schedule(layout)
    assume(layout.world_size > 1 and len(schedule.transfers) > 1)
    rank = data.draw(st.integers(0, layout.world_size - 1))
    mine = schedule.transfers_of(rank)
    assume(len(mine) > 1)
    place = data.draw(st.integers(0, len(mine) - 2))
    first, second = mine[place : place + 2]
    assume((participants(schedule, first) & participants(schedule, second)) - {rank})
    mutant = calls_of(swapped(schedule, first, second), layout, rank, "fp32")
    calls = all_calls(layout)
    calls[rank] = mutant
    with pytest.raises(UserError, match=r"^schedule: .*: ranks would hang: ") as caught:
        verify(calls)
    assert "\n" not in str(caught.value)


def test_a_swap_within_a_lane_names_both_messages() -> None:
    layout = make_layout((1, 0), (0, 4))
    other = swapped(training_schedule(layout), parse_action("0DF0"), parse_action("0DF1"))
    calls = [*all_calls(layout)[:1], calls_of(other, layout, 1, "fp32")]
    with pytest.raises(
        UserError,
        match=r"message 1 \(to experts\) from rank 0 to rank 1 is 0DF0 counts \(4 x int64\) there and 0DF1 counts",
    ):
        verify(calls)


def test_a_swap_between_lanes_is_a_circle() -> None:
    layout = make_layout((1, 0), (0, 4))
    other = swapped(training_schedule(layout), parse_action("0DF1"), parse_action("0CF0"))
    calls = [*all_calls(layout)[:1], calls_of(other, layout, 1, "fp32")]
    with pytest.raises(UserError, match=r"in a circle: next, rank 0 calls 0DF1 counts .*, rank 1 calls 0CF0 rows"):
        verify(calls)


def test_missing_calls_and_other_precisions_are_refused() -> None:
    layout = make_layout((1, 1), (2, 2))
    good = all_calls(layout)
    last = max(place for place, call in enumerate(good[1]) if call.operation == "receive")
    with pytest.raises(UserError, match=r"message \d+ .* and none here"):
        verify([good[0], good[1][:last] + good[1][last + 1 :]])
    with pytest.raises(UserError, match=r"rows \(fp32\) there and .* rows \(bf16\) here"):
        verify([good[0], calls_of(training_schedule(layout), layout, 1, "bf16")])
    with pytest.raises(UserError, match=r"collective \d+ \(world\) is 0SB0 figures \(float64\) on rank 0 and none on"):
        verify([good[0], [call for call in good[1] if call.payload != "figures"]])
    with pytest.raises(UserError, match=r"rank 0 calls 0DF0 counts \(to experts\) twice"):
        verify([[*mine, *(call for call in mine if call.batch == mine[0].batch)] for mine in good])


@given(layouts(), layouts())
def test_equal_digests_mean_equal_calls(one: Layout, other: Layout) -> None:
    first, second = (digest(training_schedule(layout), layout, "fp32") for layout in (one, other))
    assert 0 <= first < 2**63
    assert (first == second) == (one == other)
    if all_calls(one) != all_calls(other):
        assert first != second


def test_a_digest_tells_order_and_precision() -> None:
    layout = make_layout()
    schedule = training_schedule(layout)
    other = swapped(schedule, parse_action("0DF0"), parse_action("0DF1"))
    digests = [digest(schedule, layout, "fp32"), digest(other, layout, "fp32"), digest(schedule, layout, "bf16")]
    assert len(set(digests)) == 3


def test_a_rank_with_another_list_is_named() -> None:
    check_agreement([7, 7, 7])
    with pytest.raises(UserError, match="rank 2 derives other communication calls"):
        check_agreement([7, 7, 8])
