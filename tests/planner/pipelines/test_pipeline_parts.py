"""Pipelines on parts of a cluster: equal ones side by side; and by dollars, on the devices that pay, within a limit."""

from typing import Any

import pytest
from test_pipelines import inputs

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.bounds.work import work_dollars
from hetermoe_cli.planner.cluster.objective import Wanted, dollars_per_hour, least_dollars, merit
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.planner.pipeline_search import search as pipeline_search
from hetermoe_cli.planner.pipeline_search.cost import PipelineCost
from hetermoe_cli.planner.pipeline_search.setups import Tuned
from hetermoe_cli.planner.pipelines import parts as pipeline_parts
from hetermoe_cli.planner.pipelines.bound import pipeline_bound
from hetermoe_cli.planner.pipelines.layouts import best_pipelines
from hetermoe_cli.planner.pipelines.parts import promising_parts, whole_setups
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.plan import Plan


def priced(dollars: dict[str, float], **options: int) -> Inputs:
    """Nodes of two devices on slow links, and what a device of each type costs an hour."""
    given = inputs([(name, 2) for name in ("old", "new") * 2], slow=True, batch=32, layers=12, **options)
    groups = [node.model_copy(update={"price_per_hour": dollars[node.device]}) for node in given.cluster.nodes]
    return given.model_copy(update={"cluster": given.cluster.model_copy(update={"nodes": groups})})


def planned(given: Inputs, **wanted: object) -> Plan:
    options = PlanOptions(solver=SolverOptions(time_limit=1.5), wanted=Wanted(**wanted))  # type: ignore[arg-type]
    return make_plan(given, options)


def used(plan: Plan) -> list[int]:
    return sorted(rank for group in plan.groups for ranks in group.replicas for rank in ranks)


def test_the_most_tokens_a_dollar_come_from_the_devices_that_pay() -> None:
    given = priced({"new": 1.0, "old": 30.0}, memory=20_000_000)  # a node does not hold the model
    plan, without = planned(given, objective="cost"), planned(given, objective="cost", stages=False)
    assert any(group.pipeline for group in plan.groups)
    assert plan.objective == "cost"
    assert {given.devices()[rank].type for rank in used(plan)} == {"new"}
    assert set(used(plan)) <= {2, 3, 6, 7}
    assert plan.economy is not None
    assert without.economy is not None
    assert plan.economy.tokens_per_dollar > 1.01 * without.economy.tokens_per_dollar
    assert plan.economy.tokens_per_dollar <= plan.economy.most_tokens_per_dollar
    assert 1 - plan.gap == pytest.approx(plan.economy.tokens_per_dollar / plan.economy.most_tokens_per_dollar)
    assert replay_groups(plan.inputs, plan.groups).seconds == pytest.approx(plan.predicted.iteration_seconds)
    assert any("tokens a dollar" in note and "without a pipeline" in note for note in plan.notes)
    assert any("they would not pay for themselves: 4 old" in note for note in plan.notes)


def test_a_limit_on_cost_is_kept_and_a_higher_one_is_no_slower() -> None:
    given, seconds = priced({"new": 2.0, "old": 1.0}), []
    for most in (4.0, 12.0):
        plan = planned(given, most_cost=most)
        assert dollars_per_hour(given.cluster, used(plan)) <= most
        assert plan.bound.iteration_seconds <= plan.predicted.iteration_seconds
        seconds.append(plan.predicted.iteration_seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


def test_parts_are_those_that_may_be_used_the_best_first() -> None:
    given = priced({"new": 2.0, "old": 1.0})
    cost = CostModel(given)
    for wanted in (Wanted("cost"), Wanted(most_cost=8.0), Wanted("cost", most_cost=5.0)):
        parts = promising_parts(cost, wanted, float("inf"), 1.05, 60.0)
        first = [setups[0] for setups in parts]
        used_by = [[rank for stages in tuned.units for unit in stages for rank in unit] for _, tuned in first]
        values = [merit(given.cluster, wanted, ranks, one[0]) for ranks, one in zip(used_by, first, strict=True)]
        assert values
        assert values == sorted(values)
        for ranks in used_by:
            assert dollars_per_hour(given.cluster, ranks) <= (wanted.most_cost or 12.0)
    assert not promising_parts(cost, Wanted(most_cost=1.0), float("inf"), 1.05, 60.0)  # no two devices


@pytest.mark.parametrize("wanted", [{"objective": "cost"}, {"most_cost": 1000.0}, {}])
def test_parts_that_only_seem_to_fit_are_no_reason_to_give_up(wanted: dict[str, Any]) -> None:
    """Activations: eight devices are estimated to hold what only twelve do; neither time nor price may hide these."""
    given = inputs([("new", 4)] * 3, layers=12, batch=36, memory=5_000_000, ffn_size=8, saved_bytes=2000)
    nodes = [node.model_copy(update={"price_per_hour": 1.0}) for node in given.cluster.nodes]
    given = given.model_copy(update={"cluster": given.cluster.model_copy(update={"nodes": nodes})})
    for limit in (0.1, 2.0):
        plan = make_plan(given, PlanOptions(solver=SolverOptions(time_limit=limit), wanted=Wanted(**wanted)))
        assert all(group.pipeline for group in plan.groups)
        headroom = given.train.memory_headroom
        assert all(memory.total_bytes <= headroom * memory.capacity_bytes for memory in plan.memory)


def test_a_plan_that_is_faster_lost_by_its_price() -> None:
    given = priced({"new": 1.0, "old": 30.0}, memory=20_000_000)
    options = PlanOptions(solver=SolverOptions(time_limit=1.5), wanted=Wanted("cost"), explain=True)
    plan = make_plan(given, options)
    assert plan.explanation is not None
    for lost in plan.explanation.runner_ups:
        faster = lost.iteration_seconds < plan.predicted.iteration_seconds * (1 - 1e-3)
        assert faster is ("faster, but it trains fewer tokens a dollar" in lost.reason)
    asked = make_plan(given, PlanOptions("pp", SolverOptions(time_limit=1.5), explain=True))
    assert asked.explanation is not None
    assert asked.explanation.runner_ups


def test_bounds_of_stages_are_no_higher_than_those_without() -> None:
    given = priced({"new": 2.0, "old": 1.0})
    cost = CostModel(given)
    prices = {"new": 2.0, "old": 1.0}
    assert 0 < work_dollars(cost, 16, prices, stages=True) <= work_dollars(cost, 16, prices)
    assert least_dollars(cost, 16, stages=True) == pytest.approx(work_dollars(cost, 16, prices, stages=True) / 3600)
    # no part of the cluster is faster than all of it, nor cheaper than each work on the type that is cheapest at it
    assert least_dollars(cost, 16, stages=True) <= dollars_per_hour(given.cluster, range(8)) / 3600 * pipeline_bound(
        cost, 16
    )


def many_nodes(new: int, old: int, monkeypatch: pytest.MonkeyPatch) -> CostModel:
    """More nodes than are looked at together, of one device each on slow links."""
    for module in (pipeline_search, pipeline_parts):
        monkeypatch.setattr(module, "MOST_UNITS", 4)
    monkeypatch.setattr(pipeline_search, "FEW_DEVICES", 1)
    return CostModel(inputs([("new", 2)] * new + [("old", 2)] * old, slow=True, batch=48, layers=12))


@pytest.mark.parametrize(("new", "old"), [(3, 3), (5, 1), (4, 3)])
def test_many_nodes_have_pipelines_on_equal_parts_side_by_side(
    new: int, old: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = many_nodes(new, old, monkeypatch)
    setups = whole_setups(cost, float("inf"), None, 60.0)
    assert setups
    assert [seconds for seconds, _ in setups] == sorted(seconds for seconds, _ in setups)
    for _, tuned in setups:
        ranks = [rank for stages in tuned.units for unit in stages for rank in unit]
        assert len(ranks) == len(set(ranks)) <= 2 * (new + old)
        assert len(tuned.units) == len(tuned.layers) == len(tuned.micro_batches) == tuned.setup.pipelines > 1
        assert sum(tuned.micro_batches) == tuned.setup.micro_batches
    seconds, groups = best_pipelines(cost, setups[:1], 0.0)[0]
    assert sum(len(group.replicas) * group.sequences for group in groups) == 48
    assert seconds == pytest.approx(replay_groups(cost.inputs, groups).seconds)
    assert seconds >= pipeline_bound(cost, 16)
    assert all(g.fits for g in replay_groups(cost.inputs, groups).groups)


def test_parts_are_no_more_than_the_groups_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = many_nodes(3, 3, monkeypatch)
    assert not whole_setups(cost, float("inf"), 1, 60.0)
    assert {tuned.setup.pipelines for _, tuned in whole_setups(cost, float("inf"), 2, 60.0)} == {2}


def test_larger_parts_are_looked_at_where_smaller_ones_do_not_hold_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, sizes = many_nodes(8, 8, monkeypatch), []
    search = pipeline_parts.overlapped_pipelines

    def none_on_few_nodes(part: CostModel, *rest: Any) -> list[tuple[float, Tuned]]:
        sizes.append(len(part.inputs.nodes))
        return search(part, *rest) if len(part.inputs.nodes) > 4 else []

    monkeypatch.setattr(pipeline_parts, "overlapped_pipelines", none_on_few_nodes)
    assert whole_setups(cost, float("inf"), None, 60.0)
    assert sizes[0] == 4
    assert sizes[-1] == 8
    assert max(sizes[:-1]) == 4


def test_as_many_layers_as_memory_holds() -> None:
    """Woven, memory is not quite linear in the layers."""
    given = inputs([("new", 2)] * 2, layers=12, memory=16_000_000, saved_bytes=1000)
    costs = PipelineCost(CostModel(given), 2, 2, "none", "woven")
    room = given.train.memory_headroom * 16_000_000
    found = {in_flight: costs.most_layers((0, 1), in_flight, False, False) for in_flight in range(1, 30)}
    assert 1 < len({*found.values()}) < 12
    for in_flight, most in found.items():
        assert not most or costs._needed("new", in_flight, False, False, most) <= room


def test_where_there_is_something_to_beat_no_part_is_looked_at_once_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cost, looked = CostModel(priced({"new": 2.0, "old": 1.0})), []
    monkeypatch.setattr(pipeline_parts, "whole_setups", lambda *given: looked.append(given) or [])
    assert promising_parts(cost, Wanted("cost"), 1e-9, 1.05, 0.0) == []
    assert len(looked) == 1
    assert promising_parts(cost, Wanted("cost"), float("inf"), 1.05, 0.0) == []
    assert len(looked) > 2
