"""Plans for an expert load: never slower than numbers, within memory, and the balanced plan where the load is even."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import random_inputs

from builders import make_inputs, make_layout, make_model, pipelines
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.by_name.named import AIMS, Aim, Named
from hetermoe_cli.planner.by_name.single_moves import neighbours
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.replay import replay_seconds, typical
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.load import ExpertLoad

OPTIONS = PlanOptions(solver=SolverOptions(time_limit=10.0))


def with_load(inputs: Inputs, layers: list[list[float]]) -> Inputs:
    return inputs.model_copy(update={"expert_load": ExpertLoad(layers=layers)})


def instance(seed: int, *, tight: bool = False) -> Inputs:
    """Two to four devices, up to three layers of up to six experts, and counts from 0 to 100 for each."""
    rng = random.Random(seed)
    layers, experts = rng.randint(1, 3), rng.randint(2, 6)
    inputs = random_inputs(
        rng, devices=rng.randint(2, 4), layers=layers, experts=experts, batch=rng.choice([2, 4]), tight=tight
    )
    counts = [[rng.choice([0, 1, 5, 20, 100]) for _ in range(experts - 1)] + [1] for _ in range(layers)]
    return with_load(inputs, counts)  # type: ignore[arg-type]


def seconds_of(inputs: Inputs, layout: Layout) -> float:
    return simulate(LayoutCost(CostModel(inputs), layout)).seconds


@settings(max_examples=3)
@given(st.integers(0, 10**6))
def test_never_slower_than_numbers_or_a_rival_and_never_below_its_bound(seed: int) -> None:
    inputs = instance(seed)
    balanced = make_plan(inputs.model_copy(update={"expert_load": None}), OPTIONS)
    plan = make_plan(inputs, OPTIONS)
    seconds = plan.predicted.iteration_seconds
    assert seconds <= seconds_of(inputs, balanced.layout) * (1 + 1e-9)
    assert plan.load is not None
    assert seconds <= (plan.load.numbered_iteration_seconds or np.inf) * (1 + 1e-9)
    for name in ("ep", "dist_ep", "gather_squeeze"):
        assert seconds <= (plan.baselines[name].iteration_seconds or np.inf) * (1 + 1e-9)
    assert plan.bound.iteration_seconds <= seconds * (1 + 1e-9)
    assert plan.bound.exact_over == "not solved"
    assert seconds == pytest.approx(seconds_of(plan.inputs, plan.layout))
    for placement in plan.layout.placement:
        everyone = [expert for rank in placement.experts for expert in rank] + placement.replicated
        assert sorted(everyone) == list(range(inputs.model.experts))


@settings(max_examples=3)
@given(st.integers(0, 10**6))
def test_memory_is_never_exceeded(seed: int) -> None:
    inputs = instance(seed, tight=True)
    try:
        plan = make_plan(inputs, OPTIONS)
    except UserError as error:
        if error.code is not ExitCode.DOES_NOT_FIT:
            raise
        return
    for memory in plan.memory:
        assert memory.total_bytes <= memory.capacity_bytes * inputs.train.memory_headroom


@settings(max_examples=3)
@given(st.integers(0, 10**6))
@pytest.mark.long
def test_an_even_load_changes_nothing(seed: int) -> None:
    inputs = instance(seed).model_copy(update={"expert_load": None})
    even = with_load(inputs, [[7.0] * inputs.model.experts] * inputs.model.layers)
    without, plan = make_plan(inputs, OPTIONS), make_plan(even, OPTIONS)
    assert plan.predicted.iteration_seconds == pytest.approx(without.predicted.iteration_seconds, rel=1e-9)
    assert plan.load is not None
    assert plan.load.imbalance_per_layer == pytest.approx([1.0] * inputs.model.layers)
    assert without.load is None


@given(st.integers(0, 10**6), st.sampled_from(AIMS))
def test_every_aim_places_every_expert_within_the_room(seed: int, aim: Aim) -> None:
    inputs = instance(seed, tight=seed % 2 == 0)
    cost, world = CostModel(inputs), inputs.cluster.world_size
    hosted = [0] * world
    for expert in range(inputs.model.experts):
        hosted[expert % world] += 1
    start = make_layout([1] + [0] * (world - 1), hosted, layers=inputs.model.layers)
    named = Named(cost, start)
    layout = named.place(aim)  # the Layout itself checks that all experts are there once
    if layout is None:
        return
    taken = sum(named.taken(layer, placement) for layer, placement in enumerate(layout.placement))
    assert (taken <= named.room + 1e-6).all()
    if aim.same_counts:
        assert [list(map(len, p.experts)) for p in layout.placement] == [hosted] * inputs.model.layers


@given(st.integers(0, 10**6), st.sampled_from(AIMS), pipelines())
def test_experts_stay_in_their_pipeline_stage_within_the_room(seed: int, aim: Aim, start: Layout) -> None:
    rng, world = random.Random(seed), start.world_size
    inputs = random_inputs(
        rng, devices=world, layers=start.layers, experts=start.experts, batch=start.micro_batches, tight=seed % 2 == 0
    )
    loaded = with_load(inputs, [[rng.randint(1, 100) for _ in range(start.experts)] for _ in range(start.layers)])
    named = Named(CostModel(loaded), start)
    layout = named.place(aim)
    if layout is None:
        return
    Layout.model_validate(layout.model_dump())  # checks that stages host what is theirs
    taken = sum(named.taken(layer, placement) for layer, placement in enumerate(layout.placement))
    assert (taken <= named.room + 1e-6).all()
    for layer in range(start.layers):
        for placement in neighbours(named, layout, layer):
            placements = [placement if other == layer else layout.placement[other] for other in range(start.layers)]
            Layout.model_validate(layout.model_dump() | {"placement": placements})


def two_hosts(load: list[float], *, olds: int = 2) -> tuple[Inputs, Layout]:
    """One attending device and `olds` equal hosts of 2 experts each; one layer, top-1."""
    model = make_model(layers=1, experts=2 * olds, top_k=1)
    inputs = make_inputs([("new", 1)] + [("old", 1)] * olds, model=model)
    layout = make_layout([1] + [0] * olds, [0] + [2] * olds, layers=1)
    return with_load(inputs, [load]), layout


def moving(share: int) -> ExpertLoad:
    """Two experts, even in the mean, of which one gets `share` of ten rows in one step and the other in the next."""
    return ExpertLoad(layers=[[5, 5]], samples=[[[share, 10 - share]], [[10 - share, share]]])


@pytest.mark.parametrize("share", [5, 9])
def test_seconds_are_the_mean_over_samples_and_what_moves_is_replicated(share: int) -> None:
    inputs = make_inputs([("new", 2)], model=make_model(layers=1, experts=2, top_k=1))
    inputs = inputs.model_copy(update={"expert_load": moving(share)})
    plan, cost = make_plan(inputs, OPTIONS), CostModel(inputs)
    seconds = [simulate(LayoutCost(step, plan.layout)).seconds for step in cost.steps]
    assert plan.predicted.iteration_seconds == pytest.approx(np.mean(seconds), rel=1e-9)
    assert len(cost.steps) == 2
    assert [len(placement.replicated) for placement in plan.layout.placement] == [0 if share == 5 else 2]
    ep = plan.baselines["ep"].iteration_seconds
    assert ep is not None
    if share == 5:
        assert ep == pytest.approx(plan.predicted.iteration_seconds)
    else:  # one of its two ranks has nine of ten rows
        assert ep > 1.2 * plan.predicted.iteration_seconds


def test_a_typical_step_is_the_one_closest_to_the_mean() -> None:
    inputs = make_inputs([("new", 2)], model=make_model(layers=1, experts=2, top_k=1))
    shares = [[[5.0, 5]], [[8.0, 2]], [[9.0, 1]]]
    cost = CostModel(inputs.model_copy(update={"expert_load": ExpertLoad(layers=[[7, 3]], samples=shares)}))
    layout = LayoutCost(cost, make_layout([1, 1], [1, 1], layers=1, micro_batches=1))
    seconds = [simulate(LayoutCost(step, layout.layout)).seconds for step in cost.steps]
    assert replay_seconds(layout) == pytest.approx(np.mean(seconds))
    assert simulate(typical(layout)).seconds == seconds[1]


def test_named_experts_balance_load() -> None:
    inputs, layout = two_hosts([4, 4, 1, 1])
    placed = Named(CostModel(inputs), layout).place(Aim())
    assert placed is not None
    cost = LayoutCost(CostModel(inputs), placed)
    assert [sum(cost.expert_rows(rank, 0, 0)) for rank in range(3)] == pytest.approx([0, 32, 32])
    assert [sum(LayoutCost(CostModel(inputs), layout).expert_rows(rank, 0, 0)) for rank in range(3)] == pytest.approx(
        [0, 51.2, 12.8]
    )


def test_a_hot_expert_stays_alone() -> None:
    inputs, layout = two_hosts([6, 2, 2, 2])
    placed = Named(CostModel(inputs), layout).place(Aim())
    assert placed is not None
    assert sorted(map(len, placed.placement[0].experts)) == [0, 1, 3]
    assert [0] in placed.placement[0].experts


def test_seconds_bytes_and_room_are_those_of_the_layout() -> None:
    inputs, layout = two_hosts([5, 3, 1, 1])
    cost = CostModel(inputs)
    named, before = Named(cost, layout), LayoutCost(cost, layout)
    memory = before.memory(1)
    limit = memory.capacity_bytes * inputs.train.memory_headroom
    assert named.room[1] - named.taken(0, layout.placement[0])[1] == pytest.approx(limit - memory.total_bytes)
    # 64 rows a sequence: 32 for expert 0 at 0.02 s and twice that backward, and half an optimizer step (R = 2)
    assert named.seconds(0)[1, 0] == pytest.approx(32 * 0.02 * 3 + inputs.model.expert_parameters * 1e-6 / 2)
    assert named.target[0] == pytest.approx([0, *2 * [2 * (16 * 0.02 * 3 + inputs.model.expert_parameters * 1e-6 / 2)]])


def test_neighbours_differ_by_one_expert() -> None:
    inputs, layout = two_hosts([5, 3, 1, 1, 1, 1], olds=3)
    named = Named(CostModel(inputs), layout)
    found = list(neighbours(named, layout, 0))
    assert any(placement.replicated == [0] for placement in found)
    for placement in found:
        Layout(schedule=layout.schedule, sequences_per_rank=layout.sequences_per_rank, placement=[placement])
        before, after = ([set(e) for e in p.experts] for p in (layout.placement[0], placement))
        assert sum(len(b - a) for b, a in zip(before, after, strict=True)) in (1, 2)


def test_what_fits_only_with_a_balanced_router_says_so() -> None:
    """An expert keeps 100 kB a row: 16 rows of a sequence with a balanced router, all 64 if one expert gets them."""
    model = make_model(layers=1, experts=4, top_k=1)
    base = make_inputs([("new", 1), ("new", 1)], model=model, global_batch_sequences=2)
    table = base.profiles["new"].tables[0]
    points = [point.model_copy(update={"saved_bytes": 10**5 * point.tokens}) for point in table.expert]
    small = {"tables": [table.model_copy(update={"expert": points})], "memory_bytes": 8_800_000}
    inputs = base.model_copy(update={"profiles": {"new": base.profiles["new"].model_copy(update=small)}})
    assert make_plan(inputs, OPTIONS).memory
    with pytest.raises(UserError, match=r"not under the expert load: rank .* needs") as error:
        make_plan(with_load(inputs, [[1, 0, 0, 0]]), OPTIONS)
    assert error.value.code is ExitCode.DOES_NOT_FIT
