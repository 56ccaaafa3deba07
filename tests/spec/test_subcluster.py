"""spec/cluster.py: the cluster of some ranks alone."""

import pytest

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.base import sha256
from hetermoe_cli.spec.cluster import ClusterSpec, Link, NodeGroup, devices, subcluster

LINK = Link(bandwidth_gigabytes_per_second=10, latency_microseconds=20)


def cluster(nics: int = 4) -> ClusterSpec:
    """Ranks 0-7: two nodes of four "a"; ranks 8-10: three nodes of one "b"."""
    links = {"network": LINK, "interconnect": LINK}
    return ClusterSpec(
        name="test",
        nodes=[
            NodeGroup(name="a", count=2, device="A", devices=4, nics=nics, price_per_hour=2.0, **links),
            NodeGroup(name="b", count=3, device="B", devices=1, nics=1, **links),
        ],
    )


@pytest.mark.parametrize("ranks", [[0, 1, 2, 3, 8, 9], [0, 1, 4, 5, 10], [3], [2, 3, 4, 8], list(range(11))])
def test_a_subcluster_has_the_devices_of_its_ranks(ranks: list[int]) -> None:
    whole, part = devices(cluster(), {}), devices(subcluster(cluster(), ranks), {})
    assert [d.rank for d in part] == list(range(len(ranks)))
    assert [(d.type, d.network, d.interconnect) for d in part] == [
        (whole[r].type, whole[r].network, whole[r].interconnect) for r in ranks
    ]
    for field in ("node", "nic"):  # shared by the same ranks as before
        shared = [[getattr(whole[r], field) == getattr(whole[s], field) for s in ranks] for r in ranks]
        assert [[getattr(d, field) == getattr(e, field) for e in part] for d in part] == shared


def test_equal_nodes_stay_together_and_keep_their_price() -> None:
    nodes = subcluster(cluster(), [0, 1, 4, 5, 8, 10]).nodes
    assert [(n.count, n.device, n.devices, n.nics, n.price_per_hour) for n in nodes] == [
        (2, "A", 2, 2, 2.0),
        (2, "B", 1, 1, None),
    ]


def test_a_nic_never_serves_two_groups() -> None:
    with pytest.raises(
        UserError, match=r"field nodes\.a: 2 of a node's 4 devices cannot join other nodes: they share 1"
    ):
        subcluster(cluster(nics=1), [0, 1, 8])
    assert subcluster(cluster(nics=1), [0, 1]).nodes[0].devices == 2  # needs no NIC
    assert subcluster(cluster(nics=1), [0, 1, 2, 3, 8]).world_size == 5


@pytest.mark.parametrize("ranks", [[], [0, 0], [11]])
def test_ranks_must_be_distinct_ranks_of_the_cluster(ranks: list[int]) -> None:
    with pytest.raises(UserError, match="are not distinct ranks of it"):
        subcluster(cluster(), ranks)


def test_a_node_group_without_a_price_is_what_it_was_before_there_were_prices() -> None:
    assert "price_per_hour" not in cluster().nodes[1].model_dump()
    priced = cluster().nodes[1].model_copy(update={"price_per_hour": 1.0})
    assert sha256(priced) != sha256(cluster().nodes[1])
