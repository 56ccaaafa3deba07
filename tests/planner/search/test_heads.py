"""Heads apart: found where attending devices are busy all the time, valid, no slower than what climbs start from."""

from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make_inputs, make_layout, make_model, make_profile
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.pipelines.bound import pipeline_bound
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.reasons.explain import _left_out
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.planner.search import heads, incumbent, outer
from hetermoe_cli.planner.search.dealt import Dealt
from hetermoe_cli.planner.search.heads import shared, with_heads
from hetermoe_cli.planner.search.outer import Found
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.simulator import check_deadlock, simulate
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout

SOLVER = SolverOptions(time_limit=10.0)


def inputs(*, head: float = 0.02, memory_bytes: int = 10**9) -> Inputs:
    """Two new devices, busy with attention and a head of `head` seconds a token, and two old ones that are not."""
    model = make_model(layers=2, experts=4, top_k=1)
    profiles = {
        name: make_profile(
            name, model=model, attention_seconds=slow, expert_seconds=1e-2, head_seconds=head, memory_bytes=memory
        )
        for name, slow, memory in (("new", 1.0, 10**9), ("old", 8.0, memory_bytes))
    }
    return make_inputs([("new", 2), ("old", 2)], model=model, profiles=profiles, global_batch_sequences=8)


BASE = make_layout((1, 1, 0, 0), (0, 0, 2, 2), layers=2, micro_batches=4)


def found(given: Inputs) -> Found:
    """The search's result."""
    return outer.search(CostModel(given), SOLVER, 4, ())


def test_hosts_compute_heads_where_attention_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incumbent, "with_shifts", lambda *_: iter(()))
    cost = CostModel(inputs())
    apart = found(cost.inputs)
    monkeypatch.setattr(incumbent, "with_heads", lambda *_: iter(()))
    plain = found(cost.inputs)
    assert apart.layout is not None
    assert any(apart.layout.head[2:])
    assert apart.status == "feasible"
    assert plain.status == "optimal"
    assert apart.seconds < 0.95 * plain.seconds
    layout_cost = LayoutCost(cost, apart.layout)
    assert simulate(layout_cost).seconds == apart.seconds
    assert overflow(layout_cost) is None
    assert Layout.model_validate(apart.layout.model_dump()) == apart.layout
    check_deadlock(training_schedule(apart.layout), 2)


def test_a_plan_with_the_head_apart_says_so_and_is_above_its_bound() -> None:
    plan = make_plan(inputs(), PlanOptions(solver=SOLVER, max_micro_batches=4))
    assert plan.layout.head
    assert plan.bound.work_iteration_seconds == pytest.approx(pipeline_bound(CostModel(inputs()), 4))
    assert plan.bound.work_iteration_seconds <= plan.predicted.iteration_seconds
    assert any("the head apart" in note for note in plan.notes)


def test_a_device_that_only_computes_heads_is_not_left_out() -> None:
    layout = make_layout((1, 1, 0, 0), (0, 0, 4, 0), layers=2, micro_batches=4)
    cost = CostModel(inputs())
    left_out = list(_left_out(cost, layout))
    assert left_out == ["left out on purpose, they would slow the others down: ranks 3 (old)"]
    assert not list(_left_out(cost, layout.model_copy(update={"head": [1, 1, 0, 2]})))


@pytest.mark.parametrize(
    ("given", "base", "seconds"),
    [
        (inputs(), BASE, heads._Shares(CostModel(inputs()), BASE).least),  # too little to gain
        (inputs(memory_bytes=10**5), BASE, inf),  # no room for it
        (inputs(), make_layout((1, 1, 0, 0), (0, 0, 2, 2), layers=2, micro_batches=4, dense_state="full"), inf),
    ],
)
def test_bases_that_heads_apart_do_not_help(given: Inputs, base: Layout, seconds: float) -> None:
    assert not list(with_heads(CostModel(given), [base], seconds, 1e9))


def test_large_clusters_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(with_heads(CostModel(inputs()), [BASE], inf, 1e9))
    monkeypatch.setattr(heads, "MOST_DEVICES", 3)
    assert not list(with_heads(CostModel(inputs()), [BASE], inf, 1e9))


def test_climbs_never_end_above_where_they_start() -> None:
    cost = CostModel(inputs())
    starts = [LayoutCost(cost, layout) for layout in heads._Shares(cost, BASE).starts()]
    least = min(simulate(start).seconds for start in starts)
    assert min(simulate(LayoutCost(cost, one)).seconds for one in with_heads(cost, [BASE], inf, 1e9)) <= least


def test_perfectly_divisible_heads_are_below_every_share(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = CostModel(inputs())
    shares = heads._Shares(cost, BASE)
    for layout in shares.starts():
        assert shares.least <= simulate(LayoutCost(cost, layout)).seconds


@given(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4))
def test_shares_of_the_head_are_kept_as_whole_parts(wanted: list[float]) -> None:
    layout = shared(BASE, np.array(wanted))
    for rank, share in enumerate(wanted):
        assert layout.head_share(rank) == pytest.approx(share / sum(wanted), abs=1e-3)


@given(st.integers(0, 4), st.integers(0, 4))
def test_a_table_is_dealt_evenly_and_read_back(first: int, second: int) -> None:
    table = np.array([[first, 4 - first], [second, 4 - second]])
    dealt = Dealt(CostModel(inputs()), BASE, [(0, 1), (2, 3)])
    layout: Any = dealt.layout(table)
    assert Layout.model_validate(layout.model_dump()) == layout
    assert (Dealt(dealt.cost, layout, dealt.classes).table == table).all()
    for placement in layout.placement:
        assert abs(len(placement.experts[0]) - len(placement.experts[1])) <= 1


def test_a_single_class_has_nothing_to_climb_by() -> None:
    """It climbed for ever."""
    layout = make_layout((1, 1, 1, 1), (1, 1, 1, 1), layers=2, micro_batches=2)
    dealt = Dealt(CostModel(inputs()), layout, [(0, 1, 2, 3)])
    start = dealt.replayed(dealt.table)
    assert dealt.climbed(start, inf) == start
