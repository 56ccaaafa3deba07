"""Devices added to a cluster or taken away: the text form, what becomes of nodes, and refusals."""

import pytest

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.change import Change, changed_cluster, one_more_of_each, parse_change
from hetermoe_cli.spec.cluster import ClusterSpec, NodeGroup

A40 = NodeGroup(name="a", count=2, device="A40", devices=1, network="eth", interconnect="pcie4", price_per_hour=2.0)
V100 = NodeGroup(name="v", count=3, device="V100", devices=4, nics=2, network="ib", interconnect="nvlink")
CLUSTER = ClusterSpec(name="c", nodes=[A40, V100])


def nodes(text: str) -> list[tuple[str, int, str, int, int]]:
    changed = changed_cluster(CLUSTER, parse_change(text))
    return [(g.name, g.count, g.device, g.devices, g.nics) for g in changed.nodes]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("+2 A40", ((2, "A40"),)),
        ("-1 V100", ((-1, "V100"),)),
        (" + 1 A40 , -12 A100-80 ", ((1, "A40"), (-12, "A100-80"))),
    ],
)
def test_the_text_form(text: str, parts: tuple[tuple[int, str], ...]) -> None:
    change = parse_change(text)
    assert change == Change(parts)
    assert parse_change(str(change)) == change


@pytest.mark.parametrize("text", ["", "2 A40", "+2", "+x A40", "+0 A40", "+1 A40,", "+1 A40 V100", "+1.5 A40"])
def test_text_that_is_no_change(text: str) -> None:
    with pytest.raises(UserError, match=r"--what-if .* is no change: write '\+2 A40' or '-1 V100'"):
        parse_change(text)


def test_added_devices_get_nodes_of_their_own_like_the_last_of_their_type() -> None:
    assert nodes("+2 V100") == [
        ("a", 2, "A40", 1, 1),
        ("v", 3, "V100", 4, 2),
        ("added-V100", 2, "V100", 1, 1),
    ]
    changed = changed_cluster(CLUSTER, parse_change("+1 V100,+1 A40,+1 A40"))
    assert [group.network for group in changed.nodes[2:]] == ["ib", "eth", "eth"]
    assert [group.price_per_hour for group in changed.nodes[2:]] == [None, 2.0, 2.0]
    assert len({group.name for group in changed.nodes}) == 5


def test_added_devices_are_on_machines_of_their_own() -> None:
    box = CLUSTER.model_copy(update={"nodes": [A40.model_copy(update={"count": 1, "machine": "box"}), V100]})
    changed = changed_cluster(box, parse_change("+2 A40"))
    assert [group.machine for group in changed.nodes] == ["box", None, None]


def test_a_new_type_gets_the_links_of_the_first_group_and_no_price() -> None:
    added = changed_cluster(CLUSTER, parse_change("+1 T4")).nodes[-1]
    assert (added.device, added.network, added.interconnect, added.price_per_hour) == ("T4", "eth", "pcie4", None)


def test_the_last_devices_go_and_their_node_keeps_a_nic_each() -> None:
    assert nodes("-1 V100")[1:] == [("v", 2, "V100", 4, 2), ("v-rest", 1, "V100", 3, 2)]
    assert nodes("-7 V100")[1:] == [("v", 1, "V100", 4, 2), ("v-rest", 1, "V100", 1, 1)]
    assert nodes("-8 V100")[1:] == [("v", 1, "V100", 4, 2)]
    assert nodes("-10 V100")[1:] == [("v", 1, "V100", 2, 2)]
    assert nodes("-12 V100") == [("a", 2, "A40", 1, 1)]
    assert nodes("+1 A40,-2 A40") == [("a", 1, "A40", 1, 1), ("v", 3, "V100", 4, 2)]


@pytest.mark.parametrize("text", ["+1 T4", "-5 V100", "+3 A40,-2 V100", "-2 A40"])
def test_the_number_of_devices_is_right(text: str) -> None:
    change = parse_change(text)
    after = changed_cluster(CLUSTER, change)
    assert after.world_size == CLUSTER.world_size + sum(count for count, _ in change.parts)
    ClusterSpec.model_validate(after.model_dump())  # a copy is not checked


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-3 A40", "3 A40 to remove, there are 2"),
        ("-1 A40,-2 A40", "2 A40 to remove, there are 1"),
        ("-1 T4", "1 T4 to remove, there are 0"),
        ("-2 A40,-12 V100", "no device would be left"),
        ("+99999999999 A40", "at most 16384 can be planned"),
    ],
)
def test_impossible_changes(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        changed_cluster(CLUSTER, parse_change(text))


def test_one_more_of_each_type() -> None:
    assert list(map(str, one_more_of_each(CLUSTER))) == ["+1 A40", "+1 V100"]
