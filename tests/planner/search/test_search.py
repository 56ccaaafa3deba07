"""The proof takes turns: a MILP that needs more than its first share of the time gets it."""

from math import inf

import pytest

from builders import make_inputs, make_model, make_profile, make_schedule
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.objective import Wanted
from hetermoe_cli.planner.instance.choice import ALL, Choice
from hetermoe_cli.planner.milp import problem as milp
from hetermoe_cli.planner.milp.model import Model
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.search import outer
from hetermoe_cli.planner.search.candidates import Candidate
from hetermoe_cli.planner.solver import Run, SolverOptions
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs

LIMIT = 600.0
pytestmark = pytest.mark.usefixtures("within_bounds")  # or nothing is left to prove


def inputs() -> Inputs:
    """Two new devices and an old one, which leave several choices to the MILPs."""
    model = make_model(layers=2, experts=5, top_k=1)
    link = Link(bandwidth_gigabytes_per_second=0.3, latency_microseconds=20.0)
    profiles = {
        name: make_profile(name, model=model, attention_seconds=1e-3 * slow, expert_seconds=2.3e-5 * slow)
        for name, slow in (("new", 1.0), ("old", 3.0))
    }
    nodes = [("new", 1), ("new", 1), ("old", 1)]
    return make_inputs(nodes, model=model, profiles=profiles, global_batch_sequences=4, network=link, interconnect=link)


@pytest.mark.long
def test_a_milp_that_needs_more_time_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real, granted = milp.solve, []

    def slow(model: Model, options: SolverOptions) -> Run:
        granted.append(options.time_limit)
        if options.time_limit < 0.6 * LIMIT:
            return Run("unknown", inf, -inf, options.time_limit)
        return real(model, options)

    options = PlanOptions(solver=SolverOptions(time_limit=LIMIT, relative_gap=1e-5), wanted=Wanted(most_groups=1))
    plan = make_plan(inputs(), options)
    monkeypatch.setattr(outer, "PRESSING", 0.0)  # so that several choices share the time
    monkeypatch.setattr(milp, "solve", slow)
    again = make_plan(inputs(), options)
    assert min(granted) < 0.6 * LIMIT < max(granted)
    assert again.bound.exact_over == plan.bound.exact_over == "devices"
    assert again.predicted.iteration_seconds == pytest.approx(plan.predicted.iteration_seconds, rel=1e-4)
    assert again.bound.iteration_seconds == pytest.approx(plan.bound.iteration_seconds, rel=1e-4)


@pytest.mark.long
def test_a_milp_is_not_begun_again_with_less_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where choices do not press: most of the time at once, and no second time with about as much."""
    granted, problems = [], []

    def unsolved(model: Model, options: SolverOptions) -> Run:
        granted.append(options.time_limit)
        problems.append((model.rates.choice, model.rates.classes, model.mode, model.limits))
        return Run("unknown", inf, -inf, options.time_limit)

    monkeypatch.setattr(outer, "PRESSING", 1.0)
    monkeypatch.setattr(milp, "solve", unsolved)
    plan = make_plan(
        inputs(), PlanOptions(solver=SolverOptions(time_limit=LIMIT, relative_gap=1e-5), wanted=Wanted(most_groups=1))
    )
    assert plan.solver.status == "feasible"
    assert 0.7 * LIMIT < granted[0] < 0.76 * LIMIT
    assert len(set(problems)) == len(problems)


@pytest.mark.long
def test_a_solver_that_gives_up_ends_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not asked again, and the plan claims no more than the bounds from patterns."""
    asked = 0

    def useless(model: Model, options: SolverOptions) -> Run:
        nonlocal asked
        asked += 1
        return Run("unknown", inf, -inf, 0.0)

    options = PlanOptions(solver=SolverOptions(time_limit=LIMIT, relative_gap=1e-5), wanted=Wanted(most_groups=1))
    best = make_plan(inputs(), options).predicted.iteration_seconds
    monkeypatch.setattr(milp, "solve", useless)
    plan = make_plan(inputs(), options)
    assert plan.solver.status == "feasible"
    assert plan.bound.iteration_seconds < best
    assert 0 < asked <= 5 * plan.solver.candidates


def test_a_milp_that_has_ended_is_not_solved_again_where_no_more_devices_can_be_apart() -> None:
    state = outer.Search(CostModel(inputs()), SolverOptions(), deadline=inf)
    candidate = Candidate(0.0, Choice(make_schedule("zebra", 2), (2, 0, 0)))
    for apart in (0, 1, ALL):  # every class is a single device
        assert state._run(candidate, outer.Stage("mean", apart=apart), 20.0)
    assert state.solved == 1
    assert candidate.bound > 0
