"""Idle devices leave their group where no NIC would be shared."""

import pytest
from cluster_builders import fleet

from builders import make_layout
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.planner.cluster.trim import trimmed
from hetermoe_cli.spec.plan import Group

LAYOUT = make_layout((1, 0, 0, 0, 0, 0), (4, 4, 0, 0, 0, 0), micro_batches=4)  # ranks 2 to 5 do nothing
SOME = make_layout((1, 0, 0, 0, 0, 0), (4, 0, 4, 0, 0, 0), micro_batches=4)


@pytest.mark.parametrize(("nics", "kept"), [(2, [0, 2]), (1, [0, 1, 2, 3])])
def test_single_devices_with_their_own_nic_or_whole_nodes(nics: int, kept: list[int]) -> None:
    inputs = fleet([("new", 6, 2)], nics=nics, batch=8)
    replicas = [list(range(6)), list(range(6, 12))]
    layout, left = trimmed(SOME, replicas, inputs.devices())
    assert left == [kept, [6 + rank for rank in kept]]
    assert layout.sequences_per_rank == [SOME.sequences_per_rank[rank] for rank in kept]
    before = replay_groups(inputs, [Group.of(SOME, replicas)])
    after = replay_groups(inputs, [Group.of(layout, left)])
    assert after.seconds == pytest.approx(before.seconds)


def test_a_device_with_its_own_nic_stays_where_others_of_its_node_share_theirs() -> None:
    """What is left of such a node could not be described (spec.cluster.subcluster)."""
    inputs = fleet([("new", 2, 4)], nics=3, batch=4)  # of a node's devices the first two share one
    layout = make_layout((1, 0, 0, 0, 0, 0, 0, 0), (0, 2, 2, 0, 2, 2, 0, 0), micro_batches=4)
    kept, left = trimmed(layout, [list(range(8))], inputs.devices())
    assert (kept, left) == (layout, [list(range(8))])
    assert replay_groups(inputs, [Group.of(kept, left)]).seconds > 0


def test_a_layout_without_idle_ranks_stays_as_it_is() -> None:
    devices = fleet([("new", 3, 2)]).devices()
    assert trimmed(LAYOUT, [list(range(6))], devices)[1] == [[0, 1]]
    busy = make_layout((1, 0), (4, 4))
    assert trimmed(busy, [[0, 1]], devices) == (busy, [[0, 1]])


@pytest.mark.parametrize(("nics", "kept"), [(2, [0, 2, 4]), (1, [0, 1, 2, 3, 4, 5])])
def test_a_device_that_only_computes_heads_stays_and_all_keep_their_shares(nics: int, kept: list[int]) -> None:
    inputs = fleet([("new", 6, 2)], nics=nics, batch=8)
    replicas = [list(range(6)), list(range(6, 12))]
    apart = SOME.model_copy(update={"head": [1, 0, 0, 0, 3, 0]})
    layout, left = trimmed(apart, replicas, inputs.devices())
    assert left == [kept, [6 + rank for rank in kept]]
    assert layout.head == [apart.head[rank] for rank in kept]
    before = replay_groups(inputs, [Group.of(apart, replicas)])
    after = replay_groups(inputs, [Group.of(layout, left)])
    assert after.seconds == pytest.approx(before.seconds)
