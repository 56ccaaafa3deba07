"""What binds a layout, which memory is tight or rules out a faster order, and why other layouts lost."""

import pytest

from builders import make_cost, make_inputs, make_layout, make_model, make_profile
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.reasons.binding import alternatives, binding, with_runner_ups
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.planner.search.runner_up import RunnerUp, best_of_families, family
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.explanation import Explanation
from hetermoe_cli.spec.layout import Layout

NODES = [("new", 1), ("old", 1)]


def lean(memory: int = 10**10, layout: Layout | None = None) -> LayoutCost:
    """One attending and one hosting device with `memory` bytes each; activations are large."""
    model = make_model()
    profiles = {
        name: make_profile(name, model=model, saved_bytes=10_000, memory_bytes=memory) for name in ("new", "old")
    }
    inputs = make_inputs(NODES, model=model, profiles=profiles, global_batch_sequences=4)
    return LayoutCost(CostModel(inputs), layout or make_layout((1, 0), (0, 4), micro_batches=4))


def test_the_binding_resource_is_the_largest_share() -> None:
    found = binding(make_cost(make_layout((1, 0), (0, 4)), NODES))
    assert found.binding == max(found.critical_path, key=lambda name: found.critical_path[name])
    assert sum(found.critical_path.values()) == pytest.approx(1.0)
    assert (found.tight_memory, found.memory_excluded, found.runner_ups) == ([], "", [])


def test_memory_above_95_percent_of_the_usable_bytes_is_tight() -> None:
    cost = lean()
    need, usable = cost.memory(1).total_bytes, 0.9
    assert cost.memory(0).total_bytes < 0.9 * need
    (tight,) = binding(lean(int(need / usable / 0.96))).tight_memory
    assert (tight.device, tight.ranks, tight.largest_kind) == ("old", [1], "activations")
    assert tight.share == pytest.approx(0.96, abs=1e-3)
    assert binding(lean(int(need / usable / 0.94))).tight_memory == []


def test_memory_rules_out_a_faster_order() -> None:
    sequential = make_layout((1, 0), (0, 4), micro_batches=4, schedule="sequential")
    cost = lean(layout=sequential)
    room = int(1.01 * max(cost.memory(rank).total_bytes for rank in (0, 1)) / 0.9)
    small = lean(room, sequential)
    assert overflow(small) is None
    seconds = simulate(small).seconds
    found = alternatives(small, seconds, 60)
    assert found.excluded is not None
    assert found.excluded.seconds < seconds
    assert overflow(LayoutCost(small.cost, found.excluded.layout)) is not None
    assert all(overflow(LayoutCost(small.cost, other.layout)) is None for other in found.fitting)
    text = with_runner_ups(binding(small), small, seconds, [], 60).memory_excluded
    assert text.startswith(f"{found.excluded.layout.schedule} would be ")
    assert "faster, but rank " in text
    assert "most of it activations" in text
    assert alternatives(cost, seconds, 60).excluded is None


def test_families_by_schedule_recomputation_and_who_attends() -> None:
    cost = make_cost(make_layout((1, 1, 0), (0, 0, 4)), [("new", 1), ("old", 2)]).cost
    names = {
        family(cost, make_layout(sequences, (0, 2, 2), schedule=schedule, recompute=recompute, micro_batches=count))
        for schedule, recompute in (("zebra", "none"), ("sequential", "experts"))  # type: ignore[arg-type]
        for sequences in ((1, 0, 0), (1, 1, 0), (1, 1, 1))
        for count in (2, 3)
    }
    assert names == {
        f"{order}, {who} attend"
        for order in ("zebra", "sequential, recomputation of experts")
        for who in ("new", "new and some old", "new and old")
    }


def test_the_best_of_each_family_is_kept() -> None:
    layout = make_layout()
    runner_ups = [RunnerUp(layout, 3.0, "a"), RunnerUp(layout, 2.0, "b"), RunnerUp(layout, 1.0, "a")]
    assert [(best.seconds, best.family) for best in best_of_families(runner_ups)] == [(1.0, "a"), (2.0, "b")]


def test_a_runner_up_that_waits_for_slow_attention_says_so() -> None:
    winner = make_cost(make_layout((1, 0), (0, 4)), NODES, model=make_model())
    other = make_layout((0, 1), (4, 0))  # old attends, four times as slow
    seconds = simulate(LayoutCost(winner.cost, other)).seconds
    base = simulate(winner).seconds
    found = with_runner_ups(binding(winner), winner, base, [RunnerUp.of(winner.cost, other, seconds)], 60)
    (lost,) = [lost for lost in found.runner_ups if lost.family == "zebra, old attend"]
    assert lost.slower == pytest.approx(seconds / base - 1)
    share = lost.critical_path["attention of old"]
    assert lost.reason.startswith(
        f"attention of old: {share * seconds:.3g} s of its critical path ({share:.0%}), none of"
    )
    assert [lost.iteration_seconds for lost in found.runner_ups] == sorted(
        lost.iteration_seconds for lost in found.runner_ups
    )


@pytest.mark.parametrize("explain", [False, True])
def test_a_plan_is_explained(explain: bool) -> None:
    options = PlanOptions(solver=SolverOptions(time_limit=5), explain=explain)
    found = make_plan(make_inputs(global_batch_sequences=4), options)
    explanation = found.explanation
    assert isinstance(explanation, Explanation)
    assert sum(explanation.critical_path.values()) == pytest.approx(1.0)
    assert explanation.binding == next(iter(explanation.critical_path))
    assert bool(explanation.runner_ups) is explain
    for lost in explanation.runner_ups:
        assert sum(lost.critical_path.values()) == pytest.approx(1.0)
        assert lost.reason
