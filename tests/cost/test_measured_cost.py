"""Costs under measured load and speeds: only the slow rank's compute changes, nobody's memory."""

import pytest

from builders import make_inputs, make_layout, make_model
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.measured import MeasuredCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.spec.load import ExpertLoad

LAYOUT = make_layout((1, 1, 0), (1, 1, 2), layers=2)
INPUTS = make_inputs((("new", 2), ("old", 1)), model=make_model(layers=2, experts=4))
EXPERT, ATTENTION = Action(Kind.EXPERT, Pass.BACKWARD), Action(Kind.ATTENTION, Pass.FORWARD)
HEAD, OPTIMIZER = Action(Kind.HEAD, Pass.BACKWARD), Action(Kind.OPTIMIZER, Pass.FORWARD)


def test_a_slow_rank_is_slower_in_all_that_it_computes_and_in_nothing_else() -> None:
    plain = LayoutCost(CostModel(INPUTS), LAYOUT)
    slow = LayoutCost(MeasuredCost(INPUTS, None, [1.0, 1.5, 1.0]), LAYOUT)
    for rank, factor in enumerate((1.0, 1.5, 1.0)):
        for action in (EXPERT, OPTIMIZER, *((ATTENTION, HEAD) if rank < 2 else ())):
            assert slow.seconds(rank, action) == pytest.approx(factor * plain.seconds(rank, action))
        assert slow.memory(rank) == plain.memory(rank)
    dispatch = Action(Kind.DISPATCH, Pass.FORWARD)
    assert slow.transfer(dispatch) == plain.transfer(dispatch)


def test_the_load_is_the_measured_one() -> None:
    load = ExpertLoad(layers=[[4, 2, 1, 1], [2, 2, 2, 2]])
    cost = LayoutCost(MeasuredCost(INPUTS, load, [1.0] * 3), LAYOUT)
    assert cost.expert_rows(0, 0, 0) == pytest.approx([2 * value for value in cost.expert_rows(0, 1, 0)])
