"""The one order of calls over all lanes: nobody waits in it for what comes later, and answers are not held up."""

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given

from builders import any_layouts, make_layout
from hetermoe_cli.schedule.lower import training_schedule, validation_schedule
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.simulator import check_deadlock
from hetermoe_cli.spec.layout import Layout, PipelineStage
from hetermoe_cli.turns import in_turns


def test_answers_go_between_messages() -> None:
    """Attention and experts apart: the first answer is there long before the layer's last message can be sent."""
    schedule = training_schedule(make_layout((1, 0), (0, 2), micro_batches=4, layers=2))
    order = list(map(str, in_turns(schedule, 2).transfers))
    assert " ".join(order[:11]) == "0DF0 0DF1 0CF0 0DF2 0CF1 0DF3 0CF2 1DF0 0CF3 1DF1 1CF0"
    backward = [name for name in order if name[2] == "B" and name[1] != "R"]
    assert " ".join(backward[:7]) == "1CB0 1CB1 1DB0 1CB2 1DB1 1CB3 1DB2"


@pytest.mark.parametrize("of", [training_schedule, validation_schedule])
@given(layout=any_layouts())
def test_ranks_that_keep_it_never_wait_in_a_circle(of: Callable[[Layout], Schedule], layout: Layout) -> None:
    """Even if each of them did one transfer after another."""
    schedule = of(layout)
    by_turns = in_turns(schedule, layout.layers)
    order = by_turns.transfers
    assert sorted(order) == sorted(schedule.transfers)
    for rank, way in product(range(layout.world_size), (0, 1)):
        takes_part = (schedule.senders, schedule.receivers)[way]
        for lane in {schedule.lanes_of(action)[way] for action in order}:
            own, mine = (
                [a for a in found if rank in takes_part[a] and schedule.lanes_of(a)[way] == lane]
                for found in (schedule.transfers, order)
            )
            assert mine == own
    check_deadlock(by_turns, layout.layers)


def test_pipelines_keep_the_order_of_the_schedule() -> None:
    """Stages may have unlike numbers of layers, each as slow as its devices are."""
    stages = [PipelineStage(layers=1, ranks=[0]), PipelineStage(layers=3, ranks=[1])]
    layout = make_layout((1, 1), (0, 0), replicated=2, micro_batches=4, layers=4).model_copy(
        update={"pipeline": stages}
    )
    schedule = training_schedule(layout)
    assert in_turns(schedule, 4) is schedule
