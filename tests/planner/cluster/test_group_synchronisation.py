"""What groups need to synchronise, by hand."""

import pytest
from cluster_builders import fleet, fleet_cost

from builders import make_layout
from hetermoe_cli.cost import LayoutCost
from hetermoe_cli.planner.cluster.replayed import GroupCost, replay_groups
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.plan import Group

LAYOUT = make_layout((1, 0), (4, 4), micro_batches=4)  # rank 0 attends, both host half of the experts


def test_one_group_synchronises_as_its_layout_says() -> None:
    cost = fleet_cost([("new", 1, 2)], batch=4)
    replayed = replay_groups(cost.inputs, [Group.of(LAYOUT, [[0, 1]])])
    alone = LayoutCost(cost, LAYOUT)
    assert replayed.synchronise == alone.synchronise_seconds
    assert replayed.seconds == pytest.approx(simulate(alone).seconds)
    assert replayed.busy_share(2) == pytest.approx(simulate(alone).busy_share(2))


@pytest.mark.parametrize(("nics", "behind"), [(2, 4), (1, 8)])
def test_dense_and_expert_rings_of_two_groups(nics: int, behind: int) -> None:
    cost = fleet_cost([("new", 2, 2)], nics=nics, batch=8)
    replayed = replay_groups(cost.inputs, [Group.of(LAYOUT, [[0, 1], [2, 3]])])
    latency, rounds = 20e-6, 2  # a ring of two: every byte once over 1 GB/s
    dense = cost.dense_gradient_bytes / 1e9 + rounds * latency
    experts = 2 * behind * cost.expert_gradient_bytes / 1e9 + rounds * latency  # two layers; ranks share a NIC
    assert replayed.synchronise == pytest.approx(dense + experts)


def test_groups_wait_for_the_slowest_before_they_synchronise() -> None:
    inputs = fleet([("new", 1, 2), ("old", 1, 2)], batch=8)
    replayed = replay_groups(inputs, [Group.of(LAYOUT, [[0, 1]]), Group.of(LAYOUT, [[2, 3]])])
    fast, slow = replayed.groups
    assert slow.computed == pytest.approx(4 * fast.computed, rel=0.05)
    assert replayed.seconds == slow.computed + replayed.synchronise + max(fast.optimizer, slow.optimizer)
    wait = slow.computed - fast.computed + replayed.synchronise
    traces = [
        simulate(GroupCost(fast.cost, fast.group, wait)),
        simulate(GroupCost(slow.cost, slow.group, replayed.synchronise)),
    ]
    assert [trace.seconds for trace in traces] == pytest.approx([replayed.seconds] * 2)


def test_a_replicated_expert_goes_round_all_attending_ranks() -> None:
    copies = make_layout((1, 1), (2, 2), replicated=4, micro_batches=2)
    cost = fleet_cost([("new", 2, 2)], batch=8)
    replayed = replay_groups(cost.inputs, [Group.of(copies, [[0, 1], [2, 3]])])
    size = cost.dense_gradient_bytes + 2 * 4 * cost.expert_gradient_bytes
    everyone = cost.network.all_reduce_seconds([0, 1, 2, 3], size)
    hosted = 2 * 2 * cost.expert_gradient_bytes / 1e9 + 2 * 20e-6
    assert replayed.synchronise == pytest.approx(everyone + hosted)
