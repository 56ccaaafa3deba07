"""What binds plans that were found by groups."""

import pytest

from builders import make_inputs, make_layout, make_model
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.explained import binding_of_groups, with_other_orders
from hetermoe_cli.planner.cluster.objective import Wanted
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.reasons.binding import binding
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.plan import Group

NODES = [("new", 1), ("old", 1), ("new", 1), ("old", 1)]
LAYOUT = make_layout((1, 0), (0, 4), micro_batches=2)
SLOW = Link(bandwidth_gigabytes_per_second=1e-6, latency_microseconds=0.0)


def test_two_equal_groups_are_bound_like_one() -> None:
    inputs = make_inputs(NODES, global_batch_sequences=4)
    found = binding_of_groups(replay_groups(inputs, [Group.of(LAYOUT, [[0, 1], [2, 3]])]))
    alone = binding(LayoutCost(CostModel(make_inputs(NODES[:2], global_batch_sequences=2)), LAYOUT))
    assert found.binding == alone.binding == "experts of old"
    assert sum(found.critical_path.values()) == pytest.approx(1.0)
    assert found.critical_path["experts of old"] == pytest.approx(alone.critical_path["experts of old"], rel=1e-3)


def test_the_slowest_group_binds_and_nics_have_the_clusters_names() -> None:
    inputs = make_inputs(NODES, global_batch_sequences=4, network=SLOW)
    slow = make_layout((1, 0), (0, 4), micro_batches=3)
    fast = make_layout((0, 1), (4, 0), micro_batches=1)
    groups = [Group.of(slow, [[0, 1]]), Group.of(fast, [[2, 3]])]
    found = binding_of_groups(replay_groups(inputs, groups))
    assert "attention of new" in found.critical_path  # of the first group; in the second the old one attends
    assert "attention of old" not in found.critical_path
    links = {name for name in found.critical_path if name.startswith("NIC of ")}
    assert links
    assert links <= {"NIC of node0", "NIC of node1"}


def test_tight_memory_has_the_clusters_ranks() -> None:
    inputs = make_inputs(NODES, global_batch_sequences=4)
    groups = [Group.of(LAYOUT, [[0, 1], [2, 3]])]
    most = max(memory.total_bytes for memory in replay_groups(inputs, groups).memory(CostModel(inputs)))
    profiles = {
        name: profile.model_copy(update={"memory_bytes": int(most / 0.9 / 0.97)})
        for name, profile in inputs.profiles.items()
    }
    found = binding_of_groups(replay_groups(inputs.model_copy(update={"profiles": profiles}), groups))
    assert {rank for tight in found.tight_memory for rank in tight.ranks} in ({0, 2}, {1, 3}, {0, 1, 2, 3})
    for tight in found.tight_memory:
        assert {NODES[rank][0] for rank in tight.ranks} == {tight.device}
        assert 0.95 < tight.share <= 1.0


def test_a_plan_of_groups_says_what_binds_it() -> None:
    inputs = make_inputs(NODES, model=make_model(), global_batch_sequences=8)
    options = PlanOptions(solver=SolverOptions(time_limit=3), explain=True, wanted=Wanted(most_groups=4))
    plan = make_plan(inputs, options)
    assert plan.explanation is not None
    assert sum(plan.explanation.critical_path.values()) == pytest.approx(1.0)
    assert with_other_orders(plan, 5.0).groups == plan.groups
