"""What groups need to synchronise, by hand."""

import pytest
from cluster_builders import fleet, fleet_cost

from builders import make_layout
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.planner.cluster.replayed import Replayed, replay_groups
from hetermoe_cli.planner.cluster.synchronise import expert_seconds
from hetermoe_cli.schedule.action import Kind
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.plan import Group

LAYOUT = make_layout((1, 0), (4, 4), micro_batches=4)  # rank 0 attends, both host half of the experts


def seconds_of(replayed: Replayed) -> list[float]:
    """Of every layer's all-reduce, the head's last: equal in all groups."""
    return shared_seconds(replayed, Kind.REDUCE)


def shared_seconds(replayed: Replayed, kind: Kind) -> list[float]:
    found = [[cost.seconds for cost in (g.over_groups or {})[kind]] for g in replayed.groups]
    assert all(seconds == found[0] for seconds in found)
    return found[0]


def test_one_group_synchronises_as_its_layout_says() -> None:
    cost = fleet_cost([("new", 1, 2)], batch=4)
    replayed = replay_groups(cost.inputs, [Group.of(LAYOUT, [[0, 1]])])
    alone = LayoutCost(cost, LAYOUT)
    assert replayed.synchronise == 0.0
    assert replayed.seconds == pytest.approx(simulate(alone).seconds)
    assert replayed.busy_share(2) == pytest.approx(simulate(alone).busy_share(2))


@pytest.mark.parametrize(("nics", "behind"), [(2, 4), (1, 8)])
def test_dense_and_expert_rings_of_two_groups(nics: int, behind: int) -> None:
    cost = fleet_cost([("new", 2, 2)], nics=nics, batch=8)
    replayed = replay_groups(cost.inputs, [Group.of(LAYOUT, [[0, 1], [2, 3]])])
    ring = 2 * 20e-6  # of two ranks: two latencies, every byte once over 1 GB/s
    dense = cost.dense_gradient_bytes / 1e9 + 3 * ring  # two layers and the head
    experts = 2 * (behind * cost.expert_gradient_bytes / 1e9 + ring)  # ranks share a NIC
    assert sum(seconds_of(replayed)) == pytest.approx(dense + experts)
    assert (
        0 < seconds_of(replayed)[2] < seconds_of(replayed)[1] < seconds_of(replayed)[0]
    )  # the head; with the embedding
    assert replayed.synchronise == pytest.approx(seconds_of(replayed)[0])  # backward hides the others


def test_all_reduces_that_are_longer_than_backward_follow_each_other() -> None:
    cost = fleet_cost([("new", 2, 2)], batch=8, bandwidth=1e-4)
    replayed = replay_groups(cost.inputs, [Group.of(LAYOUT, [[0, 1], [2, 3]])])
    first = replayed.synchronise - sum(seconds_of(replayed))
    assert -replayed.groups[0].computed < first < 0  # they begin in the backward pass, and end long after it
    assert replayed.reduced > sum(seconds_of(replayed)) > 5 * replayed.computed


def test_groups_wait_for_the_slowest_before_they_synchronise() -> None:
    inputs = fleet([("new", 1, 2), ("old", 1, 2)], batch=8)
    replayed = replay_groups(inputs, [Group.of(LAYOUT, [[0, 1]]), Group.of(LAYOUT, [[2, 3]])])
    fast, slow = replayed.groups
    assert slow.computed == pytest.approx(4 * fast.computed, rel=0.05)
    assert replayed.reduced == slow.reduced > slow.computed
    assert replayed.seconds == pytest.approx(slow.reduced + max(fast.optimizer, slow.optimizer))
    traces = [simulate(replayed.cost_of(number)) for number in range(2)]
    assert [trace.seconds for trace in traces] == pytest.approx([replayed.seconds] * 2)


def test_a_replicated_expert_goes_round_all_attending_ranks() -> None:
    copies = make_layout((1, 1), (2, 2), replicated=4, micro_batches=2)
    cost = fleet_cost([("new", 2, 2)], batch=8)
    replayed = replay_groups(cost.inputs, [Group.of(copies, [[0, 1], [2, 3]])])
    sizes = [cost.segment_parameters(layer) * 2 + 4 * cost.expert_gradient_bytes * (layer < 2) for layer in range(3)]
    everyone = [cost.network.all_reduce_seconds([0, 1, 2, 3], size) for size in sizes]
    hosted = 2 * cost.expert_gradient_bytes / 1e9 + 2 * 20e-6  # of one layer
    assert seconds_of(replayed) == pytest.approx([everyone[0] + hosted, everyone[1] + hosted, everyone[2]])


def test_new_weights_of_shared_out_states_are_gathered_when_the_next_iteration_needs_them() -> None:
    schedule = LAYOUT.schedule.model_copy(update={"dense_state": "optimizer"})
    cost = fleet_cost([("new", 2, 2)], batch=8)
    groups = [Group.of(LAYOUT.model_copy(update={"schedule": schedule}), [[0, 1], [2, 3]])]
    replayed = replay_groups(cost.inputs, groups)
    dense = [cost.network.all_reduce_seconds([0, 2], cost.segment_parameters(layer) * 2) for layer in range(3)]
    hosted = 4 * cost.expert_gradient_bytes / 1e9 + 2 * 20e-6  # of one layer
    gathers = [(dense[0] + hosted) / 2, (dense[1] + hosted) / 2, dense[2] / 2]
    assert shared_seconds(replayed, Kind.GATHER) == pytest.approx(gathers)
    assert replayed.synchronise == pytest.approx(gathers[0] + seconds_of(replayed)[0])  # compute hides the others


def test_a_fully_sharded_dense_part_is_gathered_within_each_group() -> None:
    """During its compute, in every window; scattered there too but for the last one, whose sum is over all groups."""
    plain = make_layout((1, 1), (4, 4), micro_batches=2, schedule="sequential")
    full = make_layout((1, 1), (4, 4), micro_batches=2, schedule="sequential", dense_state="full")
    cost = fleet_cost([("new", 2, 2)], batch=8)
    replicas = [[0, 1], [2, 3]]
    found, other = (replay_groups(cost.inputs, [Group.of(layout, replicas)]) for layout in (full, plain))
    experts = expert_seconds(cost, dict.fromkeys(range(4), 4), 2)
    assert shared_seconds(found, Kind.GATHER) == pytest.approx([experts / 2] * 2 + [0.0])  # new weights of experts
    *layers, head = seconds_of(other)
    scattered = [seconds - experts / 2 for seconds in layers]  # the dense part is summed whole, experts' are scattered
    assert seconds_of(found) == pytest.approx([*scattered, head])
    alone = LayoutCost(found.groups[0].cost, full)
    within = found.cost_of(0)
    for layer in range(3):
        for kind in (Kind.GATHER, Kind.REDUCE):
            assert within.collective(kind, layer, whole=False) == alone.collective(kind, layer, whole=False)
            assert within.collective(kind, layer, whole=False).seconds > 0
        both = alone.collective(Kind.GATHER, layer).seconds + (layer < 2) * experts / 2
        assert within.collective(Kind.GATHER, layer).seconds == pytest.approx(both)
    assert found.groups[0].over_groups
    assert within.collective(Kind.REDUCE, 1) == found.groups[0].over_groups[Kind.REDUCE][1]
    gathers = sum(alone.transfer(t).seconds for t in training_schedule(full, 2).transfers if t.kind is Kind.GATHER)
    least = other.seconds - len(layers) * experts / 2
    assert least < found.seconds < other.seconds + gathers  # compute hides some
    assert simulate(within).seconds == pytest.approx(found.seconds)


def test_all_reduces_use_the_ports_of_their_own_group() -> None:
    """On one node the dense ring takes interconnects; on two it takes the NICs of those that attend. Hosts' are shared
    by the expert rings."""
    port = fleet_cost([("new", 1, 2)], batch=4, nics=2).network.port
    nics = {port(nic, False, way) for nic in (0, 1) for way in (0, 1)}
    for nodes, inside in ((1, True), (2, False)):
        cost = fleet_cost([("new", nodes, 4 // nodes)], nics=4 // nodes, batch=8)
        replayed = replay_groups(cost.inputs, [Group.of(LAYOUT, [[0, 1], [2, 3]])])
        ring = {port(0, inside, way) for way in (0, 1)}
        *layers, head = (replayed.groups[0].over_groups or {})[Kind.REDUCE]
        assert set(head.ports) == ring
        assert all(set(layer.ports) == ring | nics for layer in layers)
