"""Notes of a plan: what is said of the search is not said of a rival that is written as a plan."""

from math import inf

import pytest

from builders import make_inputs
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.search.outer import Search
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.plan import Assignment, Plan

NO_GAIN, CUT_SHORT = "nothing is gained by other roles", "a longer --time-limit may find a better plan"


def planned(assignment: Assignment, old: str = "old") -> Plan:
    inputs = make_inputs([("new", 1), (old, 1)], global_batch_sequences=4)
    return make_plan(inputs, PlanOptions(assignment, SolverOptions(time_limit=60.0)))


def test_ep_is_not_called_as_fast_as_itself() -> None:
    ep, best = planned("ep"), planned("optimal")
    assert ep.predicted.iteration_seconds > 1.01 * best.predicted.iteration_seconds
    assert NO_GAIN not in "\n".join(ep.notes + best.notes)
    assert NO_GAIN in "\n".join(planned("ep", old="new").notes)


def test_more_time_is_advised_for_what_was_searched_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("explore", "prove", "prove_devices", "refine"):  # bounds stay as they are first
        monkeypatch.setattr(Search, step, lambda self, *_: None)
    best, ep = planned("optimal"), planned("ep")
    assert CUT_SHORT in "\n".join(best.notes)
    assert CUT_SHORT not in "\n".join(ep.notes)


def test_a_faster_pipeline_is_told_where_another_method_was_asked_for() -> None:
    plan = planned("ep")  # both layers on one device each: nothing is sent but activations
    faster = (plan.baselines["pp"].iteration_seconds or inf) < plan.predicted.iteration_seconds
    assert any("pipeline" in note for note in plan.notes) == faster
