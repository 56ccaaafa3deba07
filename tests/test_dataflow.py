"""dataflow.py: shared tasks, orders that cannot be shared, and schedules that are refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import any_layouts, make_layout, parse_schedule
from hetermoe_cli.dataflow import Dataflow, dataflow
from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Kind
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.simulator import check_deadlock
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from reference_simulator import never_start


def flow_of(schedule: Schedule, layers: int) -> Dataflow:
    return dataflow(schedule, layers, [()] * len(schedule.transfers))


def test_ranks_that_run_an_action_share_a_task() -> None:
    layout = make_layout((1, 1, 0, 0), (0, 0, 2, 2))
    flow = flow_of(training_schedule(layout), 2)
    ranks = {str(task.action): task.ranks.tolist() for task in flow.compute}
    assert ranks["1AF0"] == ranks["0HB1"] == [0, 1]
    assert ranks["1EF0"] == [2, 3]
    assert ranks["0SB0"] == ranks["0OB0"] == [0, 1, 2, 3]
    assert len(flow.compute) == len(ranks)


def test_so_do_ranks_of_different_orders() -> None:
    # Rank 1 hosts in one layer only, rank 2 in both.
    placement = [LayerPlacement(experts=hosts) for hosts in ([[], [0], [1]], [[], [], [0, 1]])]
    layout = make_layout().model_copy(update={"sequences_per_rank": [1, 0, 0], "placement": placement})
    flow = flow_of(training_schedule(layout), 2)
    ranks = {str(task.action): task.ranks.tolist() for task in flow.compute}
    assert (ranks["0EF0"], ranks["1EF0"]) == ([1, 2], [2])


def test_ranks_that_disagree_on_the_order_have_tasks_of_their_own() -> None:
    flow = flow_of(parse_schedule("rank 0: 0AF0 0AF1\nrank 1: 0AF1 0AF0\n"), 1)
    assert [(str(task.action), task.ranks.tolist()) for task in flow.compute] == [
        ("0AF0", [0]),
        ("0AF1", [0]),
        ("0AF1", [1]),
        ("0AF0", [1]),
    ]


@given(any_layouts())
def test_own_schedules_are_shared_in_full(layout: Layout) -> None:
    schedule = training_schedule(layout)
    flow = flow_of(schedule, layout.layers)
    assert len(flow.compute) == len({action for order in schedule.compute for action in order})
    assert sorted(flow.order) == list(range(len(flow.compute) + len(flow.transfers)))


@given(any_layouts())
def test_only_those_who_receive_wait_for_a_transfer(layout: Layout) -> None:
    schedule = training_schedule(layout)
    flow = flow_of(schedule, layout.layers)
    for task in flow.compute:
        for transfer, places in task.arrivals:
            waiting = task.ranks if places is None else task.ranks[places]
            assert {*waiting.tolist()} == {*task.ranks.tolist()} & {*schedule.receivers[schedule.transfers[transfer]]}
    for transfer in flow.transfers:
        for maker, places in transfer.makers:
            ranks = flow.compute[maker].ranks
            made = ranks if places is None else ranks[places]
            assert {*made.tolist()} == {*ranks.tolist()} & {*schedule.senders[transfer.action]}


@given(any_layouts(), st.data())
def test_every_stuck_task_of_a_shuffled_schedule_is_counted(layout: Layout, data: st.DataObject) -> None:
    schedule, layers = training_schedule(layout), layout.layers
    rank = data.draw(st.integers(0, layout.world_size - 1))
    order = tuple(data.draw(st.permutations(schedule.compute[rank])))
    mutant = Schedule(
        (*schedule.compute[:rank], order, *schedule.compute[rank + 1 :]),
        schedule.transfers,
        schedule.senders,
        schedule.receivers,
    )
    stuck = never_start(mutant, layers)
    if not stuck:
        check_deadlock(mutant, layers)
        return
    others = [task for task in stuck if task[1].kind not in (Kind.SYNCHRONISE, Kind.OPTIMIZER)]
    place, action = (others or stuck)[0]
    name = f"transfer {action}" if action.is_transfer else f"rank {max(place, 0)} {action}"
    wanted = f"schedule: deadlock: {len(stuck)} tasks never start, the first is {name}"
    with pytest.raises(UserError, match=f"^{re.escape(wanted)}$"):
        check_deadlock(mutant, layers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank 0: 0AF0\nrank 1: 0EF0 0EF1 0EF0\n", "schedule: rank 1 runs 0EF0 twice"),
        ("rank 0: 0SB0 0SB0\n", "schedule: rank 0 runs 0SB0 twice"),
        (
            "rank 0: 0AF0\nrank 1: 0EF0\ntransfer 0DF0: 0 > 1\ntransfer 0CF0: 1 > 0\ntransfer 0DF0: 0 > 1\n",
            "schedule: transfer 0DF0 is listed twice",
        ),
    ],
)
def test_a_task_listed_twice_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_deadlock(parse_schedule(text), layers=1)
