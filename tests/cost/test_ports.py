"""cost/ports.py: which ports a message occupies, and how long a fluid transfer lasts."""

import itertools
from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import GIGABYTE
from hetermoe_cli.cost.ports import Network
from hetermoe_cli.spec.cluster import Device, Link

NIC = Link(bandwidth_gigabytes_per_second=10, latency_microseconds=20)
INSIDE = Link(bandwidth_gigabytes_per_second=100, latency_microseconds=5)


def network(*places: tuple[int, int], nic: Link = NIC) -> Network:
    """One device per (node, NIC)."""
    return Network(
        [
            Device(rank=rank, type="x", node=node, nic=index, network=nic, interconnect=INSIDE)
            for rank, (node, index) in enumerate(places)
        ]
    )


def sent(world: int, **messages: float) -> np.ndarray:
    """Bytes by messages named like r0_2 (from rank 0 to rank 2)."""
    matrix = np.zeros((world, world))
    for name, size in messages.items():
        source, target = map(int, name[1:].split("_"))
        matrix[source, target] = size
    return matrix


def seconds(messages: np.ndarray, of: Network | None = None) -> float:
    """Seconds to move bytes [source, target]."""
    return (of or TWO_NODES).seconds(messages, np.arange(len(messages)))


TWO_NODES = network((0, 0), (0, 0), (1, 1), (1, 2))  # node 0: two ranks behind one NIC, node 1: a NIC each
OUT0, IN0, OUT1, IN1, OUT2, IN2 = range(6)
DEVICE_OUT = [6, 8, 10, 12]
DEVICE_IN = [7, 9, 11, 13]


def test_ports_between_nodes_are_nics_and_inside_a_node_interconnects() -> None:
    assert TWO_NODES.count == 14
    assert TWO_NODES.out_port.tolist() == [
        [-1, DEVICE_OUT[0], OUT0, OUT0],
        [DEVICE_OUT[1], -1, OUT0, OUT0],
        [OUT1, OUT1, -1, DEVICE_OUT[2]],
        [OUT2, OUT2, DEVICE_OUT[3], -1],
    ]
    assert TWO_NODES.in_port.tolist() == [
        [-1, DEVICE_IN[1], IN1, IN2],
        [DEVICE_IN[0], -1, IN1, IN2],
        [IN0, IN0, -1, DEVICE_IN[3]],
        [IN0, IN0, DEVICE_IN[2], -1],
    ]


def test_link_of_a_port() -> None:
    assert TWO_NODES.link(OUT2) == pytest.approx((1e-10, 20e-6))
    assert TWO_NODES.link(DEVICE_IN[3]) == pytest.approx((1e-11, 5e-6))


def test_one_message() -> None:
    assert seconds(sent(4, r0_2=GIGABYTE)) == pytest.approx(0.1 + 20e-6)


def test_a_shared_nic_carries_both_messages() -> None:
    assert seconds(sent(4, r0_2=GIGABYTE, r1_3=2 * GIGABYTE)) == pytest.approx(0.3 + 20e-6)


def test_the_busiest_direction_decides_and_directions_do_not_add() -> None:
    messages = sent(4, r0_2=GIGABYTE, r2_0=GIGABYTE, r3_0=GIGABYTE)
    assert seconds(messages) == pytest.approx(0.2 + 20e-6)


def test_a_message_inside_a_node_does_not_use_the_nic() -> None:
    assert seconds(sent(4, r0_1=GIGABYTE, r2_0=0.01 * GIGABYTE)) == pytest.approx(0.01 + 5e-6)


def test_what_stays_on_its_device_is_free() -> None:
    assert seconds(sent(4, r0_0=GIGABYTE, r3_3=GIGABYTE)) == 0.0


def test_latency_is_paid_once_a_transfer() -> None:
    assert seconds(sent(4, r0_2=1, r0_3=1, r1_2=1, r1_3=1)) == pytest.approx(4 / (10 * GIGABYTE) + 20e-6)


@pytest.mark.parametrize(
    ("sources", "targets", "expected"),
    [
        ([0], [2], (OUT0, IN1)),
        ([0, 1], [2, 3], (OUT0, IN1, IN2)),
        ([0, 2], [0, 1], (IN0, OUT1, DEVICE_OUT[0], DEVICE_IN[1])),
        ([3], [3], ()),
        ([0, 1], [], ()),
    ],
)
def test_ports_of_messages(sources: list[int], targets: list[int], expected: tuple[int, ...]) -> None:
    assert TWO_NODES.ports(ranks(sources), ranks(targets)) == expected


def ranks(chosen: Collection[int]) -> np.ndarray:
    return np.array(sorted(chosen), dtype=np.intp)


places = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=4, max_size=4)  # (node, its NIC)
some = st.sets(st.integers(0, 3))


@given(places, some, some)
def test_ports_are_those_of_every_pair(where: list[tuple[int, int]], sources: set[int], targets: set[int]) -> None:
    net = network(*((node, 2 * node + nic) for node, nic in where))
    expected = {
        port
        for source in sources
        for target in targets - {source}
        for port in (int(net.out_port[source, target]), int(net.in_port[source, target]))
    }
    assert net.ports(ranks(sources), ranks(targets)) == tuple(sorted(expected))
    assert sorted(port ^ 1 for port in expected) == list(net.ports(ranks(targets), ranks(sources)))


@given(
    places,
    st.lists(st.sampled_from([0.0, 1.0, 1e9]), min_size=12, max_size=12),
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
)
def test_ports_are_busy_with_their_messages(
    where: list[tuple[int, int]], sizes: list[float], targets: list[int]
) -> None:
    net, messages = network(*((node, 2 * node + nic) for node, nic in where)), np.array(sizes).reshape(4, 3)
    load = dict.fromkeys(range(net.count), 0.0)
    for source, column in itertools.product(range(4), range(3)):
        if source != targets[column]:
            for ports in (net.out_port, net.in_port):
                load[int(ports[source, targets[column]])] += messages[source, column]
    expected = [load[port] * net.link(port)[0] + net.link(port)[1] if load[port] else 0.0 for port in load]
    assert net.busy(messages, np.array(targets)).tolist() == pytest.approx(expected)


@given(st.lists(st.floats(0, 1e9), min_size=16, max_size=16))
def test_the_way_back_lasts_as_long(sizes: list[float]) -> None:
    matrix = np.array(sizes).reshape(4, 4)
    assert seconds(matrix.T) == pytest.approx(seconds(matrix))


@given(st.lists(st.floats(0, 1e9), min_size=16, max_size=16), st.integers(0, 15))
def test_more_bytes_never_take_less_time(sizes: list[float], index: int) -> None:
    matrix = np.array(sizes).reshape(4, 4)
    more = matrix.copy()
    more.flat[index] += 1e6
    assert seconds(more) >= seconds(matrix)


def test_ring_all_reduce() -> None:
    # 2 (m - 1) / m of 1 GB over the NICs, 2 (m - 1) latencies.
    seconds = TWO_NODES.all_reduce_seconds([0, 1, 2, 3], GIGABYTE)
    assert seconds == pytest.approx(6 / 4 * 0.1 + 6 * 20e-6)


def test_all_reduce_inside_a_node_uses_the_interconnect() -> None:
    assert TWO_NODES.all_reduce_seconds([0, 1], GIGABYTE) == pytest.approx(0.01 + 2 * 5e-6)


def test_all_reduce_takes_the_slowest_link_of_the_ring() -> None:
    devices = [
        Device(rank=0, type="x", node=0, nic=0, network=NIC, interconnect=INSIDE),
        Device(
            rank=1,
            type="y",
            node=1,
            nic=1,
            network=Link(bandwidth_gigabytes_per_second=1, latency_microseconds=0),
            interconnect=INSIDE,
        ),
    ]
    assert Network(devices).all_reduce_seconds([0, 1], GIGABYTE) == pytest.approx(1.0 + 2 * 20e-6)


def test_a_ring_has_a_bandwidth_of_its_own() -> None:
    link = Link(bandwidth_gigabytes_per_second=4, latency_microseconds=10, all_reduce_gigabytes_per_second=2)
    network = Network([Device(rank=r, type="x", node=r, nic=r, network=link, interconnect=link) for r in range(2)])
    assert network.all_reduce_seconds([0, 1], GIGABYTE) == pytest.approx(0.5 + 20e-6)
    assert network.seconds(np.array([[0, GIGABYTE], [0, 0]]), np.arange(2)) == pytest.approx(0.25 + 10e-6)


@pytest.mark.parametrize(("ranks", "size"), [([2], GIGABYTE), ([0, 1, 2], 0)])
def test_nothing_to_reduce(ranks: list[int], size: float) -> None:
    assert TWO_NODES.all_reduce_seconds(ranks, size) == 0.0
