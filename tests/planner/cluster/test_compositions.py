"""What a group may hold, and which ranks that is."""

from cluster_builders import fleet
from hypothesis import given
from hypothesis import strategies as st

from hetermoe_cli.planner.cluster.compositions import Composition, amounts, compositions, ranks_of
from hetermoe_cli.spec.cluster import devices, subcluster


def test_whole_nodes_and_parts_where_each_device_has_a_nic() -> None:
    own, shared = (fleet([("new", 3, 4)], nics=nics).cluster.nodes[0] for nics in (4, 1))
    assert amounts(own) == [0, 1, 2, 4, 8, 12]
    assert amounts(shared) == [0, 4, 8, 12]


def test_a_part_of_a_node_with_a_shared_nic_may_be_a_group_of_its_own() -> None:
    found = compositions(fleet([("new", 1, 4), ("old", 1, 4)], nics=1).cluster)
    assert {(4, 4), (4, 0), (0, 4), (2, 0), (0, 1)} <= set(found)
    assert (2, 4) not in found
    assert (2, 2) not in found


def test_large_clusters_get_equal_parts_of_every_choice_of_node_groups() -> None:
    found = compositions(fleet([("new", 32, 8), ("old", 32, 8), ("new", 32, 8), ("old", 32, 8)], nics=8).cluster)
    assert {(256,) * 4, (128,) * 4, (64,) * 4, (0, 0, 64, 0), (64, 0, 128, 0), (128, 128, 128, 0)} <= set(found)
    assert len(found) == len(set(found)) < 1000


@given(st.data())
def test_ranks_are_distinct_and_make_legal_subclusters(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4, 6])), min_size=1, max_size=3))
    nics = data.draw(st.sampled_from([1, 6]))
    cluster = fleet([("new", count, each) for count, each in sizes], nics=nics).cluster
    left = [count * each for count, each in sizes]
    chosen: list[tuple[Composition, int]] = []
    for composition in data.draw(st.lists(st.sampled_from(compositions(cluster)), max_size=6)):
        number = min(room // count for count, room in zip(composition, left, strict=True) if count)
        if number:
            chosen.append((composition, number))
            left = [room - number * count for count, room in zip(composition, left, strict=True)]
    replicas = ranks_of(cluster, chosen)
    everyone = [rank for group in replicas for ranks in group for rank in ranks]
    assert len(set(everyone)) == len(everyone)
    kinds = cluster.group_of_rank
    for (composition, number), group in zip(chosen, replicas, strict=True):
        assert len(group) == number
        for ranks in group:
            assert tuple(sum(kinds[rank] == k for rank in ranks) for k in range(len(sizes))) == composition
            assert subcluster(cluster, ranks) == subcluster(cluster, group[0])  # UserError if a NIC would be shared
    whole = devices(cluster, {})
    assert all(whole[rank].rank == rank for rank in everyone)
