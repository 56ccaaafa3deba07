"""planner/pipelines/: setups of pp as layouts with stages, and when they become the plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from builders import make_cost, make_inputs, make_layout, make_model, make_profile, pipelines
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.baselines.pp import pp
from hetermoe_cli.planner.cluster.objective import Wanted
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.planner.pipeline_search.search import overlapped_pipelines
from hetermoe_cli.planner.pipeline_search.setups import Setup, Tuned
from hetermoe_cli.planner.pipelines.bound import pipeline_bound
from hetermoe_cli.planner.pipelines.layouts import (
    CANDIDATES,
    Found,
    Shape,
    _costs,
    _seconds,
    _variants,
    best_pipelines,
    fitted,
    groups_of,
    merged,
)
from hetermoe_cli.planner.pipelines.plan_pipelines import WORTH, PipelineSearch
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.planner.search import incumbent
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.report.plan_table import devices_table, pipeline_line
from hetermoe_cli.schedule.action import Kind
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.load import ExpertLoad
from hetermoe_cli.spec.plan import Group, Plan
from hetermoe_cli.spec.train import Recompute

SLOW = Link(bandwidth_gigabytes_per_second=3e-6, latency_microseconds=0.0)


def inputs(
    nodes: list[tuple[str, int]],
    *,
    batch: int = 8,
    layers: int = 4,
    slow: bool = False,
    ffn_size: int = 224,
    memory: int = 10**10,
    saved_bytes: int = 100,
    train: dict[str, Any] | None = None,
    **other: Any,
) -> Inputs:
    """New devices take 1 s a sequence in attention and old ones 2 s; experts likewise. Nothing is computed again.
    `ffn_size`: of experts, small ones where most parameters are to be the dense part's."""
    model = make_model(layers=layers, experts=4, ffn_size=ffn_size)
    profiles = {
        "new": make_profile("new", model=model, memory_bytes=memory, saved_bytes=saved_bytes),
        "old": make_profile("old", model=model, attention_seconds=2.0, expert_seconds=0.02, memory_bytes=memory),
    }
    used = {name: profiles[name] for name, _ in nodes}
    found = make_inputs(
        nodes, model=model, profiles=used, global_batch_sequences=batch, network=SLOW if slow else None, **other
    )
    changes = {"recompute": "none"} | (train or {})
    return found.with_train(**changes)


def setup(units: list[list[tuple[int, ...]]], layers: list[list[int]], counts: list[int]) -> Tuned:
    """Pipelines of those units."""
    width, stages = len(units[0][0]), len(units[0])
    recompute: list[list[Recompute]] = [["none"] * stages for _ in units]
    return Tuned(Setup(width, stages, len(units), sum(counts)), "1F1B", units, layers, recompute, counts)


def timed(cost: CostModel, groups: list[Group]) -> list[Found]:
    """Groups as they are, with their seconds; nothing if they do not fit, or would share NICs."""
    costs = _costs(cost, groups)
    return [] if not costs or any(map(overflow, costs)) else [(_seconds(cost, groups, costs), groups)]


def planned(given: Inputs, **wanted: Any) -> Plan:
    return make_plan(given, PlanOptions(solver=SolverOptions(time_limit=1.0), wanted=Wanted(**wanted)))


def test_units_become_stages() -> None:
    """Ranks 3, 1 | 0, 2 of a micro-batch of two sequences; the plan's ranks are ascending."""
    cost = CostModel(inputs([("new", 2), ("old", 2)]))
    (group,) = groups_of(cost, Shape(setup([[(3, 1), (0, 2)]], [[3, 1]], [4])))
    assert group.replicas == [[0, 1, 2, 3]]
    assert [(stage.layers, stage.ranks) for stage in group.pipeline] == [(3, [1, 3]), (1, [0, 2])]
    assert (group.sequences_per_rank, group.schedule.micro_batches, group.schedule.window) == ([1] * 4, 4, 1)
    counts = [[len(experts) for experts in layer.experts] for layer in group.placement]
    assert counts == [[0, 2, 0, 2]] * 3 + [[2, 0, 2, 0]]
    assert group.sequences == 8


def test_equal_pipelines_are_copies_and_others_are_not() -> None:
    equal = CostModel(inputs([("new", 1)] * 4))
    tuned = setup([[(0,), (2,)], [(1,), (3,)]], [[2, 2], [2, 2]], [4, 4])
    (group,) = groups_of(equal, Shape(tuned))
    assert group.replicas == [[0, 2], [1, 3]]
    assert [group.replicas for group in groups_of(equal, Shape(replace(tuned, micro_batches=[5, 3])))] == [
        [[0, 2]],
        [[1, 3]],
    ]
    mixed = CostModel(inputs([("new", 1), ("new", 1), ("new", 1), ("old", 1)]))
    assert len(groups_of(mixed, Shape(tuned))) == 2


def test_copies_have_their_nodes_and_nics_alike() -> None:
    cost = CostModel(inputs([("new", 2), ("new", 1), ("new", 1)], nics=2))
    tuned = setup([[(0,), (1,)], [(2,), (3,)]], [[2, 2], [2, 2]], [4, 4])
    assert len(groups_of(cost, Shape(tuned))) == 2


def test_pipelines_that_would_share_a_nic_are_none() -> None:
    tuned = setup([[(0,), (2,)], [(1,), (3,)]], [[2, 2], [2, 2]], [4, 4])
    shared, own = (CostModel(inputs([("new", 2), ("new", 2)], nics=nics)) for nics in (1, 2))
    assert timed(shared, groups_of(shared, Shape(tuned))) == []
    ((seconds, groups),) = timed(own, groups_of(own, Shape(tuned)))
    assert seconds == replay_groups(own.inputs, groups).seconds


def test_equal_pipelines_behind_one_nic_are_stages_of_copies() -> None:
    """As long as they would take with NICs of their own and free sums of gradients."""
    tuned = setup([[(0,), (2,)], [(1,), (3,)]], [[3, 1], [3, 1]], [4, 4])
    shared, own = (CostModel(inputs([("new", 2), ("new", 2)], nics=nics)) for nics in (1, 2))
    one = merged(tuned)
    assert one is not None
    (group,) = groups_of(shared, Shape(one, copies=True))
    assert [(stage.layers, stage.ranks) for stage in group.pipeline] == [(3, [0, 1]), (1, [2, 3])]
    assert all(layer.replicated == [0, 1, 2, 3] for layer in group.placement)
    assert (group.sequences_per_rank, group.schedule.micro_batches) == ([1] * 4, 4)
    ((seconds, _),) = timed(shared, [group])
    assert seconds == pytest.approx(timed(own, groups_of(own, Shape(tuned)))[0][0], rel=0.05)
    assert merged(replace(tuned, micro_batches=[5, 3])) is None
    assert merged(replace(tuned, layers=[[3, 1], [2, 2]])) is None
    assert merged(setup([[(0, 1), (2, 3)]], [[2, 2]], [4])) is None


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.long), 9])
def test_stages_hold_what_copies_of_the_dense_part_do_not(devices: int) -> None:
    given = inputs([("new", devices)] * 2, layers=12, batch=36, memory=4 * 10**6, ffn_size=8)
    plan = planned(given)
    assert all(group.pipeline for group in plan.groups)
    assert any("no plan without a pipeline fits" in note for note in plan.notes)
    assert all(memory.total_bytes <= memory.capacity_bytes for memory in plan.memory)
    with pytest.raises(UserError, match="does not fit"):
        planned(given, stages=False)


def test_no_stages_where_none_are_wanted() -> None:
    plan = planned(inputs([("new", 2), ("old", 2)], slow=True, batch=32, layers=12), stages=False)
    assert not any(group.pipeline for group in plan.groups)
    assert any("--no-pipeline was asked for" in note for note in plan.notes)


def test_a_pipeline_of_single_devices_takes_as_long_as_pp_says() -> None:
    cost = CostModel(inputs([("new", 1), ("new", 1), ("old", 1)]))
    estimate, tuned = pp(cost, 16).pipelines[0]
    ((seconds, _),) = timed(cost, groups_of(cost, Shape(tuned)))
    assert seconds == pytest.approx(estimate, rel=0.03)


def test_experts_by_speed_where_a_stage_mixes_types() -> None:
    cost = CostModel(inputs([("new", 1), ("old", 1), ("new", 1), ("old", 1)]))
    tuned = setup([[(0, 1), (2, 3)]], [[2, 2]], [4])
    (even,), (fast,) = (groups_of(cost, Shape(tuned, by_speed=by_speed)) for by_speed in (False, True))
    assert [len(experts) for experts in even.placement[0].experts] == [2, 2, 0, 0]
    assert [len(experts) for experts in fast.placement[0].experts] == [3, 1, 0, 0]
    assert [len(experts) for experts in fast.placement[3].experts] == [0, 0, 3, 1]


def test_woven_passes_hide_what_travels_in_a_stage() -> None:
    link = Link(bandwidth_gigabytes_per_second=1.2e-5, latency_microseconds=0.0)
    cost = CostModel(inputs([("new", 2), ("new", 2)], batch=32, interconnect=link))
    tuned = setup([[(0, 1), (2, 3)]], [[2, 2]], [16])
    both = replace(tuned, setup=replace(tuned.setup, passes="woven"), order="woven")
    ((in_turn, _),), ((woven, (group,)),) = (timed(cost, groups_of(cost, Shape(each))) for each in (tuned, both))
    assert group.schedule.passes == "woven"
    assert woven < 0.85 * in_turn
    estimate, best = overlapped_pipelines(cost)[0]
    assert best.setup.passes == "woven"
    assert estimate == pytest.approx(timed(cost, groups_of(cost, Shape(best)))[0][0], rel=0.1)


def test_what_does_not_fit_is_computed_again_on_its_own_stage() -> None:
    """The first stage keeps activations of more micro-batches."""
    nodes, again = [("new", 1)] * 4, {"recompute": "auto"}
    tuned = setup([[(0,), (1,), (2,), (3,)]], [[3, 1, 1, 1]], [8])
    roomy = CostModel(inputs(nodes, layers=6, saved_bytes=2000, train=again))
    (group,) = groups_of(roomy, Shape(tuned))
    needed = [LayoutCost(roomy, group.layout).memory(rank).total_bytes for rank in range(4)]
    assert needed[0] > max(needed[1:])
    memory = int((needed[0] - 1) / roomy.train.memory_headroom)
    tight = CostModel(inputs(nodes, layers=6, memory=memory, saved_bytes=2000, train=again))
    found = fitted(tight, Shape(tuned))
    assert found is not None
    shape, (_, (leaner,)) = found
    assert shape.tuned.recompute == [["attention", "none", "none", "none"]]
    assert [stage.recompute for stage in leaner.pipeline] == ["attention", None, None, None]
    assert overflow(LayoutCost(tight, leaner.layout)) is None
    assert "layers 0-2 on ranks 0 with recomputation of attention" in pipeline_line(leaner.layout)
    assert fitted(CostModel(inputs(nodes, layers=6, memory=memory, saved_bytes=2000)), Shape(tuned)) is None


def test_the_best_is_no_slower_than_the_plain_setups_and_fits() -> None:
    cost = CostModel(inputs([("new", 2), ("old", 2)], batch=16))
    setups = pp(cost, 16).pipelines
    found = best_pipelines(cost, setups, 60.0)[0]
    plain = [seconds for _, tuned in setups[:2] for seconds, _ in timed(cost, groups_of(cost, Shape(tuned)))]
    assert found[0] <= min(plain)
    assert all(g.fits for g in replay_groups(cost.inputs, found[1]).groups)


def test_setups_are_replayed_as_long_as_there_is_time() -> None:
    cost = CostModel(inputs([("new", 1), ("new", 1), ("old", 1), ("old", 1)], batch=16))
    found = overlapped_pipelines(cost)
    (fast,), (slow,) = (timed(cost, groups_of(cost, Shape(found[place][1]))) for place in (0, -1))
    assert fast[0] < slow[0]
    setups = [*[(0.0, found[-1][1])] * CANDIDATES, (0.0, found[0][1])]
    assert best_pipelines(cost, setups, 60.0)[0][0] <= fast[0]
    assert {seconds for seconds, _ in best_pipelines(cost, setups, 0.0)} == {slow[0]}


@pytest.mark.parametrize("memory", [10**10, 6_500_000, 5_000_000, 4_000_000, 3_500_000, 2_000_000])
def test_memory_is_never_exceeded(memory: int) -> None:
    cost = CostModel(inputs([("new", 1), ("new", 1), ("new", 1), ("old", 1)], memory=memory))
    roomy = CostModel(inputs([("new", 1), ("new", 1), ("new", 1), ("old", 1)]))
    found = best_pipelines(cost, pp(roomy, 16).pipelines, 60.0)  # setups that were not made for so little
    for _, groups in found:
        assert all(g.fits for g in replay_groups(cost.inputs, groups).groups)
    if memory == 2_000_000:
        assert not found


@hypothesis.given(pipelines(), st.data())
def test_no_pipeline_is_faster_than_its_bound(layout: Layout, data: st.DataObject) -> None:
    nodes = [(data.draw(st.sampled_from(["new", "old"])), 1) for _ in range(layout.world_size)]
    cost = make_cost(layout, nodes, model=make_model(layers=layout.layers, experts=layout.experts, top_k=1))
    assert pipeline_bound(cost.cost, 16) <= simulate(cost).seconds


def test_the_head_may_be_where_no_attention_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken together with attention, as in the work bound, this plan was faster than its bound."""
    monkeypatch.setattr(incumbent, "with_heads", lambda *_: iter(()))  # or they are apart without stages
    model = make_model(layers=4, experts=4)
    times = {"new": (1.0, 0.05), "old": (1.1, 0.001)}
    profiles = {
        name: make_profile(name, model=model, attention_seconds=attention, head_seconds=head, expert_seconds=1e-4)
        for name, (attention, head) in times.items()
    }
    link = Link(bandwidth_gigabytes_per_second=1e-3, latency_microseconds=0.0)
    nodes = [(name, 1) for name in times]
    given = make_inputs(nodes, model=model, profiles=profiles, global_batch_sequences=16, network=link)
    plan = planned(given.with_train(recompute="none"))
    assert [len(group.pipeline) for group in plan.groups] == [2]
    assert 0.05 < plan.gap < 0.2


def test_no_more_pipelines_than_groups_are_allowed() -> None:
    cost = CostModel(inputs([("new", 1)] * 4, layers=2, batch=16))
    for most in (1, 2, None):
        (_, groups), *_ = best_pipelines(cost, overlapped_pipelines(cost, most_pipelines=most), 60.0)
        copies = sum(len(group.replicas) for group in groups)
        assert copies <= (most or 4)
    assert overlapped_pipelines(cost, 1e-3) == []  # all far slower
    fastest, slowest = (overlapped_pipelines(cost)[place][0] for place in (0, -1))
    below = (fastest + slowest) / 2
    assert all(seconds < below for seconds, _ in overlapped_pipelines(cost, below))


def test_orders_of_alike_stages_are_looked_at_once() -> None:
    cost = CostModel(inputs([("new", 1)] * 4 + [("old", 1)], layers=8))
    found = [(tuned.setup, tuned.layers, types(cost, tuned)) for _, tuned in overlapped_pipelines(cost)]
    assert all(found.count(one) == 1 for one in found)


def types(cost: CostModel, tuned: Tuned) -> list[list[str]]:
    return [[cost.devices[rank].type for unit in units for rank in unit] for units in tuned.units]


def test_setups_whose_pipelines_would_share_nics_are_no_plans() -> None:
    cost = CostModel(inputs([("new", 8)], batch=32))
    assert all(tuned.setup.pipelines == 1 or tuned.setup.width == 1 for _, tuned in overlapped_pipelines(cost))


def test_windows_of_two_are_looked_at() -> None:
    cost = CostModel(inputs([("new", 2), ("new", 2)], batch=16))
    tuned = setup([[(0, 1), (2, 3)]], [[2, 2]], [4])
    (same,), (parts,) = (groups_of(cost, Shape(tuned, window=2, parts=parts)) for parts in (1, 2))
    assert (same.schedule.micro_batches, same.sequences_per_rank) == (4, [2] * 4)
    assert (parts.schedule.micro_batches, parts.sequences_per_rank) == (8, [1] * 4)
    assert same.schedule.window == parts.schedule.window == 2
    assert same.sequences == parts.sequences == 16
    assert {(each.window, each.parts, each.tuned.setup.passes) for each in _variants(cost, Shape(tuned))} == {
        (2, parts, passes) for parts in (1, 2) for passes in ("in_turn", "woven")
    }


def test_slow_links_make_a_pipeline_the_plan(tmp_path: Path) -> None:
    given = inputs([("new", 2), ("old", 2)], slow=True, batch=32, layers=12)
    plan = planned(given)
    (group,) = plan.groups
    assert len(group.pipeline) > 1
    other = next(note for note in plan.notes if "pipeline stages: layers" in note)
    assert float(other.rpartition(" takes ")[2].split()[0]) * (1 - WORTH) > plan.predicted.iteration_seconds
    assert plan.bound.exact_over == "not solved"
    bound = pipeline_bound(CostModel(given), 16)
    assert plan.bound.iteration_seconds == plan.bound.work_iteration_seconds == bound
    assert bound <= plan.predicted.iteration_seconds
    assert plan.gap == pytest.approx(1 - bound / plan.predicted.iteration_seconds)
    assert plan.baselines.keys() >= {"ep", "pp"}
    assert plan.explanation is not None
    assert sum(plan.explanation.critical_path.values()) == pytest.approx(1)
    dump(plan, tmp_path / "plan.yaml", "")
    again = load(Plan, tmp_path / "plan.yaml")
    assert again == plan
    again.verify("plan.yaml")
    assert replay_groups(again.inputs, again.groups).seconds == pytest.approx(plan.predicted.iteration_seconds)
    limit = given.train.memory_headroom
    assert all(memory.total_bytes <= limit * memory.capacity_bytes for memory in plan.memory)


def test_why_other_pipelines_and_the_plan_without_lost() -> None:
    given = inputs([("new", 2), ("old", 2)], slow=True, batch=32, layers=12)
    plan = make_plan(given, PlanOptions(solver=SolverOptions(time_limit=1.0), explain=True))
    assert plan.explanation is not None
    lost = {one.family: one for one in plan.explanation.runner_ups}
    assert lost["no pipeline stages"].schedule.startswith(("zebra", "windowed", "sequential"))
    assert any("pipeline of" in family or "pipelines of" in family for family in lost)
    for one in lost.values():
        assert one.iteration_seconds == pytest.approx(plan.predicted.iteration_seconds * (1 + one.slower))
        assert "of its critical path" in one.reason
        assert sum(one.critical_path.values()) == pytest.approx(1)
    assert len(lost) == len(plan.explanation.runner_ups) > 1
    assert [one.slower for one in lost.values()] == sorted(one.slower for one in lost.values())


def test_the_rival_itself_can_be_planned() -> None:
    given = inputs([("new", 2), ("old", 2)], batch=8, layers=4)
    plan = make_plan(given, PlanOptions("pp", SolverOptions(time_limit=1.0)))
    assert plan.assignment == "pp"
    assert all(group.pipeline for group in plan.groups)
    wanted = plan.baselines["pp"].iteration_seconds
    assert plan.predicted.iteration_seconds == pytest.approx(wanted, rel=0.05)
    for field, value, reason in (
        ("memory_headroom", 1e-6, "does not fit"),
        ("dense_state", "full", "dense_state full"),
    ):
        train = given.train.model_copy(update={field: value})
        with pytest.raises(UserError, match=reason):
            make_plan(given.model_copy(update={"train": train}), PlanOptions("pp", SolverOptions(time_limit=1.0)))


def skewed(given: Inputs, *, samples: int = 0) -> Inputs:
    """One expert of four gets half of a layer's rows; another one in every sample."""
    layers = [[1.0 + 2 * (layer % 4 == e) for e in range(4)] for layer in range(given.model.layers)]
    moving = [[layer[-n:] + layer[:-n] for layer in layers] for n in range(samples)]
    return given.model_copy(update={"expert_load": ExpertLoad(source="test", layers=layers, samples=moving)})


@pytest.mark.parametrize("samples", [0, pytest.param(3, marks=pytest.mark.long)])
def test_experts_of_stages_are_placed_by_name(samples: int) -> None:
    given = skewed(inputs([("new", 2), ("old", 2)], slow=True, batch=32, layers=12), samples=samples)
    plan = planned(given)
    assert all(group.pipeline for group in plan.groups)
    assert plan.load is not None
    assert plan.load.balanced_iteration_seconds is not None
    assert plan.load.numbered_iteration_seconds is not None
    seconds = plan.predicted.iteration_seconds
    assert plan.load.balanced_iteration_seconds <= seconds <= plan.load.numbered_iteration_seconds * (1 + 1e-9)
    steps = [replay_groups(step.inputs, plan.groups, step).seconds for step in CostModel(plan.inputs).steps]
    assert len(steps) == max(1, samples)
    assert seconds == pytest.approx(sum(steps) / len(steps))
    assert plan.bound.iteration_seconds <= seconds
    assert any("expert load assumed" in note for note in plan.notes)


def test_the_rival_under_a_load_has_its_experts_by_number() -> None:
    given = skewed(inputs([("new", 2), ("old", 2)], batch=8, layers=4))
    plan = make_plan(given, PlanOptions("pp", SolverOptions(time_limit=1.0)))
    assert plan.load is not None
    assert plan.predicted.iteration_seconds == plan.load.numbered_iteration_seconds
    assert plan.predicted.iteration_seconds >= plan.load.balanced_iteration_seconds  # type: ignore[operator]


def test_pipelines_that_only_fit_with_a_balanced_router_are_left_out() -> None:
    given = inputs([("new", 2), ("old", 2)], slow=True, batch=32, layers=12, saved_bytes=2000)
    tuned = next(tuned for _, tuned in overlapped_pipelines(CostModel(given)) if tuned.setup.width == 2)
    (_, groups) = best_pipelines(CostModel(given), [(1.0, tuned)], 0.0)[0]
    fits = max(m.total_bytes for g in replay_groups(given, groups).groups for m in g.memory)
    memory = int(fits / given.train.memory_headroom * 1.001)
    hot = [[1e6, 1, 1, 1]] * given.model.layers
    for layers, expected in (([[1.0] * 4] * given.model.layers, True), (hot, False)):
        tight = inputs([("new", 2), ("old", 2)], slow=True, batch=32, layers=12, memory=memory, saved_bytes=2000)
        tight = tight.model_copy(update={"expert_load": ExpertLoad(source="test", layers=layers)})
        cost = CostModel(tight)
        search = PipelineSearch(cost, Wanted(), SolverOptions(time_limit=1.0), 16)
        assert (search.best([(1.0, tuned)], 1.0) is not None) is expected


def test_a_single_pipeline_is_one_group() -> None:
    plan = planned(inputs([("new", 2), ("old", 2)], slow=True, batch=32, layers=12), most_groups=1)
    assert plan.group_count == 1
    assert plan.layout.pipeline
    assert plan.max_groups == 1
    line = pipeline_line(plan.layout)
    assert line.startswith(f"pipeline  {len(plan.layout.spans)} stages: layers 0")
    assert len(devices_table(plan).rows) >= 2
    assert pipeline_line(make_layout()) == ""


def test_a_node_of_another_size_is_left_out() -> None:
    """Adding a device does not end the search for pipelines."""
    cost = CostModel(inputs([("new", 4)] * 5 + [("old", 1)], slow=True, batch=32, layers=12))
    found = overlapped_pipelines(cost)
    assert found
    assert all(rank < 20 for _, tuned in found for units in tuned.units for unit in units for rank in unit)
    assert {len(unit) % 2 for _, tuned in found for units in tuned.units for unit in units} == {0}
    assert any(len(unit) == 2 for _, tuned in found for units in tuned.units for unit in units)


def test_many_devices_are_searched_by_whole_nodes() -> None:
    given = inputs([("new", 4)] * 5, slow=True, batch=32, layers=12)
    assert all(len(unit) % 2 == 0 for _, tuned in overlapped_pipelines(CostModel(given)) for unit in tuned.units[0])
    plan = planned(given)
    assert any(group.pipeline for group in plan.groups)
    assert overlapped_pipelines(CostModel(inputs([("new", 1)] * 17))) == []


@pytest.mark.parametrize(
    ("reason", "train", "assignment"),
    [("assignment ep", {}, "ep"), ("dense_state full", {"dense_state": "full"}, "optimal")],
)
def test_why_a_faster_pipeline_is_not_the_plan(reason: str, train: dict[str, Any], assignment: Any) -> None:
    given = inputs([("new", 2), ("old", 2)], slow=True, batch=32, layers=12, train=train)
    plan = make_plan(given, PlanOptions(assignment, SolverOptions(time_limit=0.5)))
    assert not any(group.pipeline for group in plan.groups)
    (note,) = [note for note in plan.notes if note.startswith("a pipeline over layers would take")]
    assert reason in note


def test_a_pipeline_that_is_not_faster_is_no_plan_and_no_note() -> None:
    plan = planned(inputs([("new", 2)], batch=8, layers=2))
    slower = plan.model_copy(update={"predicted": plan.predicted.model_copy(update={"iteration_seconds": 1e-3})})
    cost = CostModel(plan.inputs)
    kept = PipelineSearch(cost, Wanted(), SolverOptions(), 16).instead_of(slower, pp(cost, 16).pipelines, 2.0)
    assert kept.groups == plan.groups
    assert kept.notes == plan.notes


def test_gradients_of_a_layer_go_round_the_ranks_of_its_stage_in_all_groups() -> None:
    cost = CostModel(inputs([("new", 1)] * 4))
    groups = groups_of(cost, Shape(setup([[(0,), (2,)], [(1,), (3,)]], [[3, 1], [3, 1]], [4, 4])))
    replayed = replay_groups(cost.inputs, groups, cost)
    for layer, reduce in enumerate((replayed.groups[0].over_groups or {})[Kind.REDUCE]):
        ring = [0, 1] if layer < 3 else [2, 3]
        size = cost.segment_parameters(layer) * cost.gradient_bytes
        experts = 4 * cost.expert_gradient_bytes / 1e9 if layer < 4 else 0.0
        assert reduce.seconds == pytest.approx(cost.network.all_reduce_seconds(ring, size) + experts)
        network = replayed.groups[0].cost.network
        assert {network.owner(port) for port in reduce.ports} == {(layer >= 3, False)}
    assert overflow(LayoutCost(replayed.groups[0].cost, groups[0].layout)) is None
    assert simulate(replayed.cost_of(0)).seconds == pytest.approx(replayed.seconds)


@pytest.mark.parametrize("state", ["replicated", "optimizer"])
def test_stages_gather_new_weights_while_they_wait_for_the_first_hidden_states(state: Any) -> None:
    cost = CostModel(inputs([("new", 1)] * 4, train={"dense_state": state}))
    tuned = setup([[(0,), (2,)], [(1,), (3,)]], [[2, 2], [2, 2]], [4, 4])
    replayed = replay_groups(cost.inputs, groups_of(cost, Shape(tuned)), cost)
    shared = replayed.groups[0].over_groups or {}
    spans = {span.name: span for span in simulate(replayed.cost_of(0)).spans}
    gathers = [spans[name] for name in ("0GF0", "2GF0") if name in spans]
    if state == "replicated":
        assert not gathers
        assert {cost.seconds for cost in shared[Kind.GATHER]} == {0.0}
        return
    assert shared[Kind.GATHER] == shared[Kind.REDUCE]  # half the bytes of an all-reduce
    assert [span.start for span in gathers] == [0.0, 0.0]
