"""What must hold for every instance: never worse than a rival, memory kept, costs scale, equal devices are equal."""

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import make_inputs, make_model, make_profile, make_schedule
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.cluster.objective import Wanted
from hetermoe_cli.planner.instance.choice import ALL, Choice
from hetermoe_cli.planner.instance.prepared import Prepared
from hetermoe_cli.planner.milp import problem as milp
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.search import incumbent
from hetermoe_cli.planner.solver import Run, SolverOptions
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import LayerPlacement
from hetermoe_cli.spec.schedule_choice import ExpertOrder, TransferOrder

OPTIONS = PlanOptions(solver=SolverOptions(time_limit=10.0), wanted=Wanted(most_groups=1))
GAP = OPTIONS.solver.relative_gap


def build(
    news: int, olds: int, *, layers: int, experts: int, batch: int, old: float, old_experts: float, expert: float,
    bandwidth: float, memory: int = 10**10, scale: float = 1.0, old_first: bool = False,
) -> Inputs:  # fmt: skip
    """Two device types; `scale` slows everything down alike."""
    model = make_model(layers=layers, experts=experts, top_k=1)
    link = Link(bandwidth_gigabytes_per_second=bandwidth / scale, latency_microseconds=20.0 * scale)
    profiles = {
        name: make_profile(
            name,
            model=model,
            attention_seconds=1e-3 * scale * slow,
            expert_seconds=expert * scale * slow_experts,
            head_seconds=2e-6 * scale * slow,
            optimizer_seconds_per_parameter=1e-10 * scale,
            memory_bytes=memory,
        )
        for name, slow, slow_experts in (("new", 1.0, 1.0), ("old", old, old_experts))
    }
    nodes = [("new", 1)] * news + [("old", 1)] * olds
    return make_inputs(
        nodes[::-1] if old_first else nodes,
        model=model,
        profiles={name: profiles[name] for name, _ in nodes},
        global_batch_sequences=batch,
        network=link,
        interconnect=link,
    )


def spread(experts: int, ranks: list[int], world: int) -> LayerPlacement:
    """Experts dealt out over `ranks`."""
    hosted: list[list[int]] = [[] for _ in range(world)]
    for expert in range(experts):
        hosted[ranks[expert % len(ranks)]].append(expert)
    return LayerPlacement(experts=hosted)


instances = st.fixed_dictionaries(
    {
        "news": st.integers(1, 3),
        "olds": st.integers(1, 3),
        "layers": st.integers(1, 3),
        "experts": st.integers(2, 7),
        "batch": st.sampled_from([2, 4, 6]),
        "old": st.floats(1.0, 10.0),
        "old_experts": st.floats(1.0, 3.0),
        "expert": st.sampled_from([1e-5, 3e-5]),
        "bandwidth": st.sampled_from([0.02, 0.5]),
    }
)


@settings(max_examples=4)
@given(instances)
def test_never_worse_than_a_rival_and_never_below_its_bound(instance: dict[str, float]) -> None:
    plan = make_plan(build(**instance), OPTIONS)  # type: ignore[arg-type]
    seconds = plan.predicted.iteration_seconds
    for name in ("ep", "dist_ep", "gather_squeeze", "hetero_ep"):
        rival = plan.baselines[name].iteration_seconds
        assert rival is None or seconds <= rival * (1 + 1e-9)
    assert plan.bound.iteration_seconds <= seconds * (1 + 1e-9)
    assert plan.gap == pytest.approx(1 - plan.bound.iteration_seconds / seconds, abs=1e-9)
    assert seconds == pytest.approx(simulate(LayoutCost(CostModel(plan.inputs), plan.layout)).seconds)


@settings(max_examples=4)
@given(instances, st.integers(1, 8))
def test_memory_is_never_exceeded(instance: dict[str, float], megabytes: int) -> None:
    inputs = build(**instance, memory=megabytes * 10**6)  # type: ignore[arg-type]
    try:
        plan = make_plan(inputs, OPTIONS)
    except UserError as error:
        if error.code is not ExitCode.DOES_NOT_FIT:
            raise
        return
    for memory in plan.memory:
        assert memory.total_bytes <= memory.capacity_bytes * inputs.train.memory_headroom


@settings(max_examples=4)
@given(instances, st.sampled_from([0.1, 7.0]))
@pytest.mark.long
def test_scaling_all_costs_scales_the_time(instance: dict[str, float], scale: float) -> None:
    plan, scaled = make_plan(build(**instance), OPTIONS), make_plan(build(**instance, scale=scale), OPTIONS)  # type: ignore[arg-type]
    allowed = GAP + plan.gap + scaled.gap
    assert scaled.predicted.iteration_seconds == pytest.approx(plan.predicted.iteration_seconds * scale, rel=allowed)


@settings(max_examples=4)
@given(instances)
@pytest.mark.long
def test_the_order_of_the_devices_does_not_matter(instance: dict[str, float]) -> None:
    plan, turned = make_plan(build(**instance), OPTIONS), make_plan(build(**instance, old_first=True), OPTIONS)  # type: ignore[arg-type]
    allowed = GAP + plan.gap + turned.gap
    assert turned.predicted.iteration_seconds == pytest.approx(plan.predicted.iteration_seconds, rel=allowed)


@settings(max_examples=4)
@given(instances, st.sampled_from(["news", "olds"]))
@pytest.mark.long
def test_one_more_device_is_never_slower(instance: dict[str, float], more: str) -> None:
    """Up to 8 devices the search is over single devices, and leaving one out is legal; shifts are not searched so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incumbent, "with_shifts", lambda *_: iter(()))
        plan = make_plan(build(**instance), OPTIONS)  # type: ignore[arg-type]
        grown = make_plan(build(**{**instance, more: instance[more] + 1}), OPTIONS)  # type: ignore[arg-type]
    allowed = 1 + GAP + grown.gap
    assert grown.predicted.iteration_seconds <= plan.predicted.iteration_seconds * allowed


orders = st.sampled_from(
    [(experts, transfers) for experts in get_args(ExpertOrder) for transfers in get_args(TransferOrder)]
)


@settings(max_examples=12)
@given(
    instances, st.sampled_from(["zebra", "windowed", "sequential"]), st.booleans(), st.sampled_from([0, 1, ALL]),
    st.sampled_from([2, 3]), orders,
)  # fmt: skip
def test_replay_is_never_above_the_milp_and_equal_where_classes_are_even(
    instance: dict[str, float], name: str, old_attends: bool, apart: int, micro_batches: int, order: tuple[str, str]
) -> None:
    inputs = build(**instance)  # type: ignore[arg-type]
    cost = CostModel(inputs)
    sequences = (1,) * int(instance["news"]) + (int(old_attends),) * int(instance["olds"])
    schedule = make_schedule(name, micro_batches).model_copy(
        update=dict(zip(("experts", "transfers"), order, strict=True))
    )
    ready = Prepared.of(cost, Choice(schedule, sequences), apart)
    attending = [rank for rank, count in enumerate(sequences) if count]
    start = ready.choice.layout([spread(cost.model.experts, attending, len(sequences))] * cost.model.layers)
    model = milp.build(ready.rates, ready.graph, 1.2 * simulate(LayoutCost(cost, start)).seconds, "largest")
    run = milp.solve(model, SolverOptions(time_limit=10.0, relative_gap=1e-6))
    assert run.status in ("optimal", "feasible")
    layout = ready.layout(milp.extract(model))
    replay = simulate(LayoutCost(cost, layout)).seconds
    assert replay <= run.objective * (1 + 1e-6)
    even = all(
        len({len(placement.experts[rank]) for rank in device_class.ranks}) == 1
        for placement in layout.placement
        for device_class in ready.classes
    )
    if even:
        assert replay == pytest.approx(run.objective, rel=1e-5)


def test_the_solver_result_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the MILP's solution, or if it is ignored, some plan is worse: heuristics alone do not do."""
    worse = 0
    blind = Run("unknown", float("inf"), 0.0, 0.0)
    for experts in (3, 5, 7):
        instance = build(
            2, 1, layers=2, experts=experts, batch=4, old=6.0, old_experts=1.3, expert=2.3e-5, bandwidth=0.3
        )  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(milp, "solve", lambda *_, **__: blind)
            without = make_plan(instance, OPTIONS)
        best = make_plan(instance, OPTIONS)
        assert best.predicted.iteration_seconds <= without.predicted.iteration_seconds * (1 + 1e-9)
        assert best.bound.iteration_seconds >= without.bound.iteration_seconds - 1e-12
        worse += without.bound.exact_over == "not solved" or (
            without.predicted.iteration_seconds > best.predicted.iteration_seconds * (1 + 1e-6)
        )
    assert worse
