"""How far an emulated run is stretched."""

import pytest

from builders import make_inputs, make_layout, make_plan
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.launch.prepare import PASSES, SHORTEST_EMULATED_SECONDS, SHORTEST_EMULATED_STEP, automatic_time_scale
from hetermoe_cli.schedule.action import Kind
from hetermoe_cli.schedule.lower import training_schedule


@pytest.mark.parametrize("micro_batches", [1, 64])
def test_tasks_and_steps_last_long_enough(micro_batches: int) -> None:
    """A step of few tasks is stretched further than these ask for: its norm and optimizer take real time too."""
    inputs = make_inputs([("new", 1), ("old", 1)], global_batch_sequences=2 * micro_batches)
    layout = make_layout((2, 0), (1, 3), micro_batches=micro_batches)
    scale, cost = automatic_time_scale(make_plan(inputs, layout)), LayoutCost(CostModel(inputs), layout)
    tasks = [
        [scale * cost.seconds(rank, action) for action in order if action.kind in (Kind.ATTENTION, Kind.EXPERT)]
        for rank, order in enumerate(training_schedule(layout).compute)
    ]
    step = sum(map(sum, tasks)) / layout.world_size
    assert step >= SHORTEST_EMULATED_STEP * (1 - 1e-9)
    assert (step == pytest.approx(SHORTEST_EMULATED_STEP)) == (micro_batches == 1)
    assert max(max(own) for own in tasks) >= SHORTEST_EMULATED_SECONDS


def test_last_combines_beside_a_head_that_is_apart_get_time() -> None:
    layout = make_layout((1, 1, 0), (0, 1, 3))
    inputs = make_inputs((("new", 3),), global_batch_sequences=4)
    plain = automatic_time_scale(make_plan(inputs, layout))
    apart = layout.model_copy(update={"head": [1, 1, 2]})
    assert automatic_time_scale(make_plan(inputs, apart)) == pytest.approx(PASSES * plain)
