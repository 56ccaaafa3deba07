"""Hosts that attend in shifts: who takes over what, and that plans with long sequences gain by it."""

import time
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make_inputs, make_model, make_profile, make_schedule
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.objective import Wanted
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.planner.search import incumbent, outer
from hetermoe_cli.planner.search import shifts as module
from hetermoe_cli.planner.search.outer import Found
from hetermoe_cli.planner.search.shifts import Roster, with_shifts
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.simulator import check_deadlock, simulate
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout


def inputs(older: float = 4.0) -> Inputs:
    """Two new devices, and old ones that are as good at experts, and four times slower at attention, which is most of
    the work; half of them so many times slower."""
    model = make_model(layers=4, experts=8, top_k=1)
    profiles = {
        name: make_profile(name, model=model, attention_seconds=slow, expert_seconds=1e-2, head_seconds=1e-4)
        for name, slow in (("new", 1.0), ("old", 4.0), ("older", older))
    }
    nodes = [("new", 2), ("old", 2), ("older", 2)] if older != 4.0 else [("new", 2), ("old", 4)]
    return make_inputs(nodes, model=model, profiles=profiles, global_batch_sequences=16)


def found(given: Inputs) -> Found:
    """The search's result."""
    return outer.search(CostModel(given), SolverOptions(time_limit=30.0), 16, ())


def test_hosts_take_over_sequences_where_attention_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two new devices attend to eight sequences each; with an old one in place of each for one, to seven."""
    cost = CostModel(inputs())
    shifted = found(cost.inputs)
    monkeypatch.setattr(incumbent, "with_shifts", lambda *_: iter(()))
    plain = found(cost.inputs)
    assert plain.layout is not None
    assert shifted.layout is not None
    assert shifted.layout.shifts
    assert not plain.layout.shifts
    assert shifted.seconds < 0.9 * plain.seconds
    layout_cost = LayoutCost(cost, shifted.layout)
    assert simulate(layout_cost).seconds == shifted.seconds
    assert overflow(layout_cost) is None
    check_deadlock(training_schedule(shifted.layout), shifted.layout.layers)
    assert shifted.bound <= plain.seconds


def test_layouts_with_shifts_are_valid_and_named() -> None:
    result = found(inputs())
    assert result.layout is not None
    assert Layout.model_validate(result.layout.model_dump()) == result.layout
    lost = [runner_up.family for runner_up in result.runner_ups]
    assert lost
    assert not all(family.endswith("some in shifts") for family in lost)


def base(sequences: list[int], hosted: list[int], **schedule: str) -> Layout:
    """A zebra of four micro-batches, eight experts a layer."""
    first, experts = 0, []
    for count in hosted:
        experts.append(list(range(first, first + count)))
        first += count
    placement = [{"experts": experts, "replicated": []}] * 4
    choice = make_schedule("zebra", 4, **schedule)  # type: ignore[arg-type]
    return Layout.model_validate(
        {"schedule": choice.model_dump(), "sequences_per_rank": sequences, "placement": placement}
    )


@pytest.mark.parametrize(
    "layout",
    [
        base([1, 1, 1, 1, 1, 1], [2, 2, 1, 1, 1, 1]),  # nobody is left to help
        base([2, 1, 0, 0, 0, 1], [0, 0, 2, 2, 2, 2]),  # attending ranks differ
        base([2, 2, 0, 0, 0, 0], [0, 0, 2, 2, 2, 2], dense_state="full"),
    ],
)
def test_only_layouts_whose_attending_ranks_are_alike_are_helped(layout: Layout) -> None:
    assert not list(with_shifts(CostModel(inputs()), [layout], inf, 1e9, 16))


def test_nobody_helps_without_room_for_the_dense_part() -> None:
    layout = base([2, 2, 0, 0, 0, 0], [4, 4, 0, 0, 0, 0])
    assert any(True for _ in with_shifts(CostModel(inputs()), [layout], 1e9, 1e9, 16))
    given = inputs()  # a helper holds attention of all layers, embedding and head: 0.7 MB with their states
    small = given.profiles["old"].model_copy(update={"memory_bytes": 1_500_000})
    poor = given.model_copy(update={"profiles": {**given.profiles, "old": small}})
    assert not any(True for _ in with_shifts(CostModel(poor), [layout], 1e9, 1e9, 16))


def test_large_clusters_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = base([2, 2, 0, 0, 0, 0], [0, 0, 2, 2, 2, 2])
    monkeypatch.setattr(module, "CLIMBED", 1)
    assert list(with_shifts(CostModel(inputs()), [layout], 1e9, 1e9, 16))
    monkeypatch.setattr(module, "MOST_DEVICES", 5)
    assert not list(with_shifts(CostModel(inputs()), [layout], 1e9, 1e9, 16))


@given(
    count=st.integers(1, 12),
    everywhere=st.integers(1, 4),
    helpers=st.integers(1, 5),
    others=st.integers(0, 2),
    taken=st.integers(1, 16),
    late=st.booleans(),
)
def test_every_micro_batch_has_as_many_sequences(
    count: int, everywhere: int, helpers: int, others: int, taken: int, late: bool
) -> None:
    numbers = iter(range(everywhere + helpers + others))
    first, second, third = (tuple(next(numbers) for _ in range(n)) for n in (everywhere, helpers, others))
    roster = Roster(make_schedule("zebra", count), 2, first, second, third, taken, late)
    shifts = roster.shifts()
    if shifts is None or taken < helpers:
        return
    assert sum(len(shifts[rank]) for rank in second) == taken
    assert not any(shifts[rank] for rank in third)
    assert all(sum(j in shift for shift in shifts) == everywhere for j in range(count))
    assert max(len(shifts[rank]) for rank in second) - min(len(shifts[rank]) for rank in second) <= 1


@pytest.mark.parametrize("older", [4.0, 2.0, 7.0])
def test_estimates_are_below_replays(older: float) -> None:
    layout = base([2, 2, 0, 0, 0, 0], [0, 0, 2, 2, 2, 2])
    variants = list(module._variants(CostModel(inputs(older)), [layout], 16))[:: 1 if older == 4.0 else 4]
    replays = [(v.estimate, v.dealt.replayed(table).seconds) for v in variants for table in v.starts()]
    assert len(replays) > 20
    assert all(estimate <= seconds * (1 + 1e-9) for estimate, seconds in replays)


def test_hosts_of_each_type_get_what_they_can_compute() -> None:
    """Half of the hosts are so slow at experts that they get fewer."""
    given = inputs(7.0)
    table = given.profiles["older"].tables[0]
    slow = [point.model_copy(update={"forward_seconds": 3 * point.forward_seconds}) for point in table.expert]
    older = given.profiles["older"].model_copy(update={"tables": [table.model_copy(update={"expert": slow})]})
    cost = CostModel(given.model_copy(update={"profiles": {**given.profiles, "older": older}}))
    layout = base([2, 2, 0, 0, 0, 0], [0, 0, 2, 2, 2, 2])
    variant = next(v for v in module._variants(cost, [layout], 16) if v.roster.helpers == (2,))
    placement = variant.dealt.layout(next(variant.starts())).placement
    hosted = [sum(len(layer.experts[rank]) for layer in placement) for rank in range(6)]
    assert hosted[3] > max(hosted[4:]) > 0


def test_no_more_micro_batches_than_are_allowed() -> None:
    layout = base([2, 2, 0, 0, 0, 0], [0, 0, 2, 2, 2, 2])
    counts = {v.roster.schedule.micro_batches for v in module._variants(CostModel(inputs()), [layout], 16)}
    assert counts == {4, 8}
    few = {v.roster.schedule.micro_batches for v in module._variants(CostModel(inputs()), [layout], 4)}
    assert few == {4}


def test_time_limits_are_kept() -> None:
    """Estimates of thousands of variants alone would take longer."""
    began = time.monotonic()
    assert not list(with_shifts(CostModel(inputs()), [base([2, 2, 0, 0, 0, 0], [0, 0, 2, 2, 2, 2])], 1e9, 0.0, 16))
    assert time.monotonic() - began < 5.0


def test_a_plan_with_shifts_is_explained_and_claims_no_proof() -> None:
    """Other schedules of its layout are looked at as well: not those that do not go with shifts."""
    plan = make_plan(inputs().with_train(dense_state="auto"), PlanOptions(explain=True, wanted=Wanted(most_groups=1)))
    assert plan.layout.shifts
    assert plan.solver.status == "feasible"
    assert any("no bound covers" in note for note in plan.notes)
