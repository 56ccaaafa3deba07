"""Drift: which ranks depart from what was assumed, by how much, and when that is news."""

import pytest

from builders import make_groups_plan, make_inputs, make_layout, make_model, make_plan
from hetermoe_cli.cost.measured import MeasuredState
from hetermoe_cli.planner.rebalancing.drift import Departure, Drift, find_drift
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.load import ExpertLoad

LAYOUT = make_layout((1, 0, 0), (0, 2, 2), layers=2)
INPUTS = make_inputs((("new", 2), ("old", 1)), model=make_model(layers=2, experts=4, top_k=1))
AS_PLANNED = [1.0, 1.0, 1.0]


def drift(load: list[list[float]] | None, slowdown: list[float] = AS_PLANNED, inputs: Inputs = INPUTS) -> Drift:
    measured = ExpertLoad(layers=load) if load else None
    plan = make_plan(inputs, LAYOUT)
    states = MeasuredState(inputs.expert_load, AS_PLANNED), MeasuredState(measured, slowdown)
    return find_drift(plan, plan.groups, *states)


def test_a_balanced_load_and_profiled_speeds_are_no_drift() -> None:
    for load in (None, [[5.0, 5, 5, 5], [7, 7, 7, 7]], [[5.5, 5, 5, 4.5], [7, 7, 7, 7]]):
        found = drift(load, [1.1, 0.9, 1.2])
        assert not found.departures
        assert not found.is_news_after(None)


def test_the_rank_and_layer_with_more_rows_are_named() -> None:
    found = drift([[1, 1, 1, 1], [1, 1, 3, 3]])
    assert [(d.rank, d.device, d.layer) for d in found.departures] == [(2, "old", 1)]
    assert found.departures[0].factor == pytest.approx(1.5)
    assert found.measured_seconds > found.assumed_seconds
    assert "rank 2 (old) gets 1.50 times the rows assumed in layer 1" in found.message()
    assert "\n" not in found.message()


def test_a_rank_that_gets_fewer_rows_in_all_layers_departs_too() -> None:
    found = drift([[1, 1, 3, 3], [1, 0, 3, 4]])
    assert {d.rank: pytest.approx(d.factor) for d in found.departures} == {1: 0.5, 2: 1.75}
    assert all(d.factor > 0 for d in drift([[0, 0, 3, 3], [0, 0, 3, 4]]).departures)


def test_the_load_of_the_plan_is_what_counts() -> None:
    load = ExpertLoad(layers=[[1, 1, 3, 3], [1, 1, 3, 3]])
    planned = INPUTS.model_copy(update={"expert_load": load})
    assert not drift(load.layers, inputs=planned).departures
    assert [d.rank for d in drift(None, inputs=planned).departures] == [1, 2]


def test_a_slow_device_is_named() -> None:
    found = drift(None, [1.0, 1.6, 1.0])
    assert [(d.rank, d.layer, d.factor) for d in found.departures] == [(1, None, 1.6)]
    assert "rank 1 (new) takes 1.60 times the seconds of its profile" in found.message()
    assert found.measured_seconds > found.assumed_seconds


def test_ranks_of_several_groups_are_named_with_theirs() -> None:
    """Replicas of a group may differ in speed; rows are compared with what each group's own placement was to get."""
    inputs = make_inputs((("new", 1),) * 5, model=make_model(layers=2, experts=4, top_k=1), global_batch_sequences=6)
    pair, alone = make_layout((1, 0), (1, 3)), make_layout((1,), (4,))
    plan = make_groups_plan(inputs, (pair, [[0, 1], [2, 4]]), (alone, [[3]]))
    assumed, load = MeasuredState(None, [1.0] * 5), ExpertLoad(layers=[[2, 1, 1, 0]] * 2)
    found = find_drift(plan, plan.groups, assumed, MeasuredState(load, [1, 1, 1, 1, 3]))
    assert {(d.rank, d.group, d.layer): pytest.approx(d.factor) for d in found.departures} == {
        (0, 0, 0): 2.0,
        (2, 0, 0): 2.0,
        (1, 0, 0): 2 / 3,
        (4, 0, 0): 2 / 3,
        (4, 0, None): 3.0,
    }
    assert "rank 4 (new, group 0) takes 3.00 times the seconds" in found.message()
    assert found.assumed_seconds == pytest.approx(plan.predicted.iteration_seconds)
    assert found.measured_seconds > found.assumed_seconds


def test_only_a_clear_change_is_news() -> None:
    def told(*factors: float) -> Drift:
        departures = [Departure(rank=r, device="new", factor=f, layer=0) for r, f in enumerate(factors)]
        return Drift(departures=departures, assumed_seconds=1, measured_seconds=2)

    assert told(1.5).is_news_after(None)
    assert not told(1.6).is_news_after(told(1.5))
    assert told(2.0).is_news_after(told(1.5))
    assert told(1.5, 1.5).is_news_after(told(1.5))
    assert told().is_news_after(told(1.5))
    assert "as assumed again" in told().message()
    assert "and 2 more" in told(2, 2, 2, 2, 2).message()
