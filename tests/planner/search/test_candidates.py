"""Which choices are looked at, and what is said of those that there was no time for."""

from math import inf

import pytest

from builders import make_inputs, make_model, make_profile
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.bounds.work import work_bound
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.search.candidates import Listing
from hetermoe_cli.planner.solver import SolverOptions


def four_types() -> CostModel:
    """Three devices of each of four types."""
    model = make_model(layers=2, experts=4, top_k=1)
    profiles = {
        f"type{number}": make_profile(f"type{number}", model=model, attention_seconds=1e-3 * number)
        for number in range(1, 5)
    }
    nodes = [(name, 1) for name in profiles for _ in range(3)]
    return CostModel(make_inputs(nodes, model=model, profiles=profiles, global_batch_sequences=8))


def test_a_deadline_leaves_out_divided_kinds_and_bounds_them() -> None:
    cost = four_types()
    listing = Listing(cost, 16, inf)
    everything, hurried = listing.space(inf), listing.space(inf, deadline=-inf)
    assert everything.scope == "classes"
    assert everything.rest == inf
    assert hurried.scope == "not solved"
    assert hurried.rest == work_bound(cost, 16)
    assert len(hurried.candidates) < len(everything.candidates)

    def uniform(space: object) -> list[object]:
        return [c.choice for c in space.candidates if c.uniform]  # type: ignore[attr-defined]

    assert uniform(hurried) == uniform(everything) == [c.choice for c in listing.uniform]
    assert len({c.choice for c in everything.candidates}) == len(everything.candidates)


def test_a_faster_layout_leaves_fewer_choices() -> None:
    listing = Listing(four_types(), 16, inf)
    everything = listing.space(inf).candidates
    middle = sorted(c.bound for c in everything)[len(everything) // 2]
    left = listing.space(middle).candidates
    assert {c.choice for c in left} == {c.choice for c in everything if c.bound < middle}


def test_a_plan_without_time_says_so() -> None:
    plan = make_plan(four_types().inputs, PlanOptions(solver=SolverOptions(time_limit=1e-3)))
    assert plan.bound.exact_over == "not solved"
    assert plan.bound.iteration_seconds <= plan.bound.work_iteration_seconds * (1 + 1e-9)
    assert plan.solver.status == "feasible"
    assert plan.gap == pytest.approx(1 - plan.bound.iteration_seconds / plan.predicted.iteration_seconds)
