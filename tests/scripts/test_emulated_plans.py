"""Held-out plans: drawn again they are the same, they fit, and they differ in what a schedule can be."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import emulated_plans
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.launch.prepare import automatic_time_scale
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.plan import Plan


@pytest.mark.long
def test_held_out_plans(tmp_path: Path) -> None:
    files = emulated_plans.held_out(tmp_path / "one", 6, seed=3)
    again = emulated_plans.held_out(tmp_path / "two", 6, seed=3)
    other = emulated_plans.held_out(tmp_path / "three", 1, seed=2)
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]
    plans = [load(Plan, path) for path in files]
    assert load(Plan, other[0]).layout != plans[0].layout
    assert [plan.layout.schedule.name for plan in plans] == ["zebra", "windowed", "sequential"] * 2
    assert len({str(plan.layout) for plan in plans}) == len(plans)
    assert [bool(plan.layout.shifts) for plan in plans] == [False] * 4 + [True, False]
    assert [bool(plan.layout.head) for plan in plans] == [False] * 3 + [True, False, False]
    for path, plan in zip(files, plans, strict=True):
        plan.verify(str(path))
        train = plan.inputs.train
        assert all(m.total_bytes <= m.capacity_bytes * train.memory_headroom for m in plan.memory)
        assert simulate(LayoutCost(CostModel(plan.inputs), plan.layout)).seconds == plan.predicted.iteration_seconds
        assert plan.predicted.iteration_seconds * automatic_time_scale(plan) <= emulated_plans.LONGEST_SECONDS
    assert max(p.predicted.iteration_seconds for p in plans) > 2 * min(p.predicted.iteration_seconds for p in plans)


def test_a_bound_that_no_plan_meets_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated_plans, "LONGEST_SECONDS", 0.0)
    monkeypatch.setattr(emulated_plans, "MOST_DRAWS", 5)
    with pytest.raises(RuntimeError, match="5 draws gave 0 plans"):
        emulated_plans.held_out(tmp_path, 1, seed=1)
