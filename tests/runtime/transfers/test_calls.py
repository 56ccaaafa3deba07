"""Derived communication calls: those of a plan fit together, and any that do not are refused with one clear line."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from builders import any_layouts, layouts, make_layout
from hetermoe_cli.errors import UserError
from hetermoe_cli.runtime.transfers.call_check import check, verify
from hetermoe_cli.runtime.transfers.calls import Calls, calls_of, check_agreement, digest
from hetermoe_cli.schedule.action import Action, Pass, parse_action
from hetermoe_cli.schedule.lower import training_schedule, training_schedules, validation_schedule
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.world import World


def all_calls(layout: Layout, of: Callable[[Layout], Schedule] = training_schedule) -> list[Calls]:
    schedule = of(layout)
    return [calls_of(schedule, layout, rank, "fp32") for rank in range(layout.world_size)]


def swapped(schedule: Schedule, first: Action, second: Action) -> Schedule:
    places = {first: second, second: first}
    return replace(schedule, transfers=tuple(places.get(t, t) for t in schedule.transfers))


def participants(schedule: Schedule, action: Action) -> set[int]:
    return {*schedule.senders[action], *schedule.receivers[action]}


def crosses(layout: Layout, action: Action, source: int, target: int) -> bool:
    return layout.cross(action.layer, *((source, target) if action.direction is Pass.FORWARD else (target, source)))


@given(any_layouts(), st.sampled_from([training_schedule, validation_schedule]))
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
        if not action.is_collective
        for source in schedule.senders[action]
        for target in schedule.receivers[action]
        if source != target and (action.is_exchange or crosses(layout, action, source, target))
    ]
    assert sum(call.payload == "rows" and call.operation == "send" for mine in calls for call in mine) == len(pairs)


def test_a_fully_sharded_copy_sums_replicated_experts_after_windows_of_one() -> None:
    """Its scatters of the first window and its last sums were taken for the same call."""
    check(World.of(make_layout((1, 1), (1, 2), replicated=1, schedule="sequential", dense_state="full")), "fp32")


@given(any_layouts(), st.data())
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


@given(any_layouts(), any_layouts())
def test_equal_digests_mean_equal_calls(one: Layout, other: Layout) -> None:
    first, second = (digest([training_schedule(layout)], layout, "fp32") for layout in (one, other))
    assert 0 <= first < 2**63
    assert (first == second) == (one == other)
    if all_calls(one) != all_calls(other):
        assert first != second


def test_a_digest_tells_order_and_precision() -> None:
    layout = make_layout()
    schedule = training_schedule(layout)
    other = swapped(schedule, parse_action("0DF0"), parse_action("0DF1"))
    digests = [digest([s], layout, to) for s, to in ((schedule, "fp32"), (other, "fp32"), (schedule, "bf16"))]
    assert len(set(digests)) == 3


def test_a_rank_with_another_list_is_named() -> None:
    check_agreement([7, 7, 7])
    with pytest.raises(UserError, match="rank 2 derives other communication calls"):
        check_agreement([7, 7, 8])


def side_by_side(*copies: Layout) -> World:
    """Layouts on processes dealt out in turn, so that none has neighbouring ones."""
    seats = [(rank, copy) for copy, layout in enumerate(copies) for rank in range(layout.world_size)]
    places = {seat: process for process, seat in enumerate(sorted(seats))}
    worlds = [[places[rank, copy] for rank in range(layout.world_size)] for copy, layout in enumerate(copies)]
    return World.side_by_side(list(zip(copies, worlds, strict=True)))


def world_calls(world: World) -> list[Calls]:
    schedules = training_schedules(world)
    return [calls_of(schedules[world.seat(process)[0]], world, process, "fp32") for process in range(world.size)]


def of_same_model(one: Layout, other: Layout, data: st.DataObject) -> Layout:
    """`other` with the layers and experts of `one`, placed anywhere, and the dense part held alike."""
    host = st.integers(-1, other.world_size - 1)
    placement = []
    for _ in range(one.layers):
        hosts = data.draw(st.lists(host, min_size=one.experts, max_size=one.experts))
        by_rank = [[e for e, rank in enumerate(hosts) if rank == r] for r in range(other.world_size)]
        placement.append(LayerPlacement(experts=by_rank, replicated=[e for e, rank in enumerate(hosts) if rank < 0]))
    schedule = other.schedule.model_copy(update={"dense_state": one.schedule.dense_state})
    return other.model_copy(update={"placement": placement, "schedule": schedule})


@given(any_layouts(), layouts(), st.data())
def test_the_calls_of_all_copies_fit_together_and_sum_everything(
    one: Layout, other: Layout, data: st.DataObject
) -> None:
    world = side_by_side(one, of_same_model(one, other, data))
    check(world, "fp32")
    for process, mine in enumerate(world_calls(world)):
        replica = world.replica_of(process)
        rank = replica.processes.index(process)
        copies = {call: {world.seat(member)[0] for member in call.members} for call in mine if call.members}
        sums = [call for call in mine if call.payload == "gradients" and len(copies[call]) == 2]
        for call in sums:
            state = one.schedule.dense_state
            whole = state == "replicated" or (state == "full" and call.members == world.attending)
            assert call.operation == ("all-reduce" if whole else "reduce-scatter")
        news = [call for call in mine if call.payload == "weights" and len(copies[call]) == 2]
        everything = [share for layer in range(world.layers + 1) for share in world.shares(layer)]
        shared = [s for s in everything if process in s.holders and (s.experts or world.shares_dense_states)]
        assert bool(news) == bool(one.schedule.shares_states and shared)
        within = [c for c in copies if len(copies[c]) == 1 and c not in news]
        assert not replica.layout.gathers or all(call.members == tuple(replica.attending) for call in within)
        for layer in range(world.layers):
            held = set(replica.layout.local_experts(layer, rank))
            shares = [s for s in world.shares(layer) if process in s.holders]
            assert {expert for share in shares for expert in share.experts} == held
            assert [call.members for call in sums if call.action.layer == layer] == [s.holders for s in shares]
            for share in shares:
                assert len({world.seat(holder)[0] for holder in share.holders}) == 2


def test_copies_that_sum_in_another_order_are_refused() -> None:
    pair = make_layout((1, 0), (0, 4))
    world = side_by_side(pair, make_layout((2,), (4,)))
    calls = world_calls(world)
    verify(calls)
    places = [place for place, call in enumerate(calls[0]) if call.payload == "gradients"]
    first, second = places[:2]
    calls[0][first], calls[0][second] = calls[0][second], calls[0][first]
    with pytest.raises(UserError, match=r"collective 1 \(attending\) is .* gradients \(fp32\) on rank 0 and "):
        verify(calls)


def test_a_holder_that_does_not_sum_is_refused() -> None:
    world = side_by_side(make_layout((1, 0), (0, 4)), make_layout((1, 0), (0, 4)))
    calls = world_calls(world)
    verify(calls)
    calls[3] = [call for call in calls[3] if call.payload != "gradients"]
    with pytest.raises(UserError, match=r"collective 1 \(holders 2, 3\) is 1RB0 gradients \(fp32\) on rank 2 and none"):
        verify(calls)


def test_a_digest_tells_where_copies_run() -> None:
    pair = make_layout((1, 0), (0, 4))
    worlds = [
        World.side_by_side([(pair, places), (pair, others)]) for places, others in (([0, 1], [2, 3]), ([0, 2], [1, 3]))
    ]
    assert len({digest(training_schedules(world), world, "fp32") for world in worlds}) == 2
