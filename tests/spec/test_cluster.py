"""spec/cluster.py: the numbering of ranks, nodes and NICs; names of links."""

from typing import Any

import pytest
from pydantic import ValidationError

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.cluster import ClusterSpec, Link, NodeGroup, devices

FAST = Link(bandwidth_gigabytes_per_second=100, latency_microseconds=1)
SLOW = Link(bandwidth_gigabytes_per_second=10, latency_microseconds=20)


def group(name: str, device: str, count: int, each: int, **other: Any) -> NodeGroup:
    fields = {"network": "ethernet", "interconnect": FAST, **other}
    return NodeGroup(name=name, device=device, count=count, devices=each, **fields)


def cluster(*groups: NodeGroup) -> ClusterSpec:
    return ClusterSpec(name="test", nodes=list(groups))


def test_ranks_run_through_nodes_in_file_order() -> None:
    spec = cluster(group("a", "A40", 2, 2), group("b", "V100", 1, 3), group("c", "A40", 1, 1))
    expanded = devices(spec, {"ethernet": SLOW})
    assert [d.rank for d in expanded] == list(range(8))
    assert [d.type for d in expanded] == ["A40"] * 4 + ["V100"] * 3 + ["A40"]
    assert [d.node for d in expanded] == [0, 0, 1, 1, 2, 2, 2, 3]
    assert spec.world_size == 8
    assert spec.device_types == ["A40", "V100"]


def test_one_nic_of_a_node_is_shared_by_its_devices() -> None:
    expanded = devices(cluster(group("a", "A40", 2, 2), group("b", "V100", 1, 3)), {"ethernet": SLOW})
    assert [d.nic for d in expanded] == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("nics", "expected"), [(2, [0, 0, 1, 1]), (3, [0, 0, 1, 2]), (4, [0, 1, 2, 3])])
def test_neighbouring_devices_share_a_nic(nics: int, expected: list[int]) -> None:
    spec = cluster(group("a", "A40", 1, 4, nics=nics), group("b", "V100", 1, 1))
    expanded = devices(spec, {"ethernet": SLOW})
    assert [d.nic for d in expanded] == [*expected, nics]


def test_link_names_are_resolved_and_numbers_kept() -> None:
    spec = cluster(group("a", "A40", 1, 1))
    assert spec.link_names() == {"ethernet"}
    device = devices(spec, {"ethernet": SLOW, "other": FAST})[0]
    assert (device.network, device.interconnect) == (SLOW, FAST)


def test_an_unknown_link_name_is_told_with_its_field() -> None:
    spec = cluster(group("a", "A40", 1, 1, interconnect="nvlink"))
    with pytest.raises(UserError, match=r"field nodes\.a\.interconnect: no link record named 'nvlink'"):
        devices(spec, {"ethernet": SLOW})


def test_wrong_numbers_of_a_link_are_told_and_not_that_it_has_no_name() -> None:
    with pytest.raises(ValidationError) as caught:
        group("a", "A40", 1, 1, network={"bandwith_gigabytes_per_second": 1, "latency_microseconds": 1})
    assert {error["loc"][-1] for error in caught.value.errors()} == {
        "bandwidth_gigabytes_per_second",
        "bandwith_gigabytes_per_second",
    }


def test_more_devices_than_can_be_planned_are_refused_at_once() -> None:
    with pytest.raises(ValidationError, match="at most 16384 can be planned: check count and devices"):
        cluster(group("a", "A40", 10**30, 1))


def test_more_nics_than_devices_are_refused() -> None:
    with pytest.raises(ValidationError, match="nics 3 is larger than devices 2"):
        group("a", "A40", 1, 2, nics=3)


def test_equal_names_of_groups_are_refused() -> None:
    with pytest.raises(ValidationError, match="node names must differ"):
        cluster(group("a", "A40", 1, 1), group("a", "V100", 1, 1))


def test_a_cluster_without_nodes_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least 1 item"):
        cluster()


def test_groups_on_one_machine_are_one_node_with_nics_of_their_own() -> None:
    spec = cluster(
        group("a", "A40", 1, 2, machine="box"), group("b", "T4", 2, 1), group("c", "V100", 1, 2, machine="box")
    )
    expanded = devices(spec, {"ethernet": SLOW})
    assert [d.node for d in expanded] == [0, 0, 1, 2, 0, 0]
    assert [d.nic for d in expanded] == [0, 0, 1, 2, 3, 3]
    assert spec.node_names == ["box", "b.0", "b.1"]


def test_a_machine_is_one_node() -> None:
    with pytest.raises(ValidationError, match="machine box is one node, count is 2"):
        group("a", "A40", 2, 2, machine="box")


def test_files_without_a_machine_stay_what_they_are() -> None:
    assert "machine" not in group("a", "A40", 1, 1).model_dump(mode="json")
    assert group("a", "A40", 1, 1, machine="box").model_dump(mode="json")["machine"] == "box"
