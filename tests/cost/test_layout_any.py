"""cost/layout.py on any layout, and under any load: against sums over single messages."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import layouts, make_cost
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.load import Load, RecordedLoad, balanced_load
from hetermoe_cli.schedule.action import Action, Kind, Pass, trips
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.layout import Layout

LINK = Link(bandwidth_gigabytes_per_second=1e-3, latency_microseconds=10)


@st.composite
def costs(draw: st.DrawFn) -> tuple[LayoutCost, Load]:
    """A layout on up to 3 devices a node and 2 NICs, with a balanced or a recorded load."""
    layout: Layout = draw(layouts())
    world, per_node = layout.world_size, draw(st.integers(1, 3))
    nodes = [(draw(st.sampled_from(["new", "old"])), min(per_node, world - r)) for r in range(0, world, per_node)]
    cost = make_cost(layout, nodes, nics=draw(st.integers(1, 2)), network=LINK, interconnect=LINK)
    if draw(st.booleans()):
        return cost, balanced_load(cost.cost, layout)
    size = (world, layout.layers, layout.micro_batches, layout.experts)
    counts = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 3, size)
    counts[np.array(layout.sequences_per_rank) == 0] = 0
    load = RecordedLoad(counts, 1.5)
    return LayoutCost(cost.cost, layout, load), load


def messages(cost: LayoutCost, load: Load, action: Action) -> dict[tuple[int, int], float]:
    """Bytes by (source, target) of a transfer."""
    rows, placement = load(action.layer, action.micro_batch), cost.layout.placement[action.layer]
    result = {}
    for rank, host in itertools.permutations(range(cost.layout.world_size), 2):
        pair = (rank, host) if action.towards_experts else (host, rank)
        result[pair] = sum(float(rows[rank, expert]) for expert in placement.experts[host]) * cost.cost.row_bytes
    return result


def transfers(layout: Layout) -> list[Action]:
    return [
        Action(kind, direction, layer, j)
        for kind, direction in itertools.product((Kind.DISPATCH, Kind.COMBINE), Pass)
        for layer, j in itertools.product(range(layout.layers), range(layout.micro_batches))
    ]


@given(costs())
def test_a_transfer_lasts_as_long_as_its_busiest_port(given: tuple[LayoutCost, Load]) -> None:
    cost, load = given
    network = cost.cost.network
    for action in transfers(cost.layout):
        bytes_at = [0.0] * network.count
        for pair, size in messages(cost, load, action).items():
            for port in (network.out_port[pair], network.in_port[pair]):
                bytes_at[port] += size
        seconds = [size * network.link(port)[0] + network.link(port)[1] for port, size in enumerate(bytes_at) if size]
        longest = trips(action, cost.layout.schedule) * max(seconds, default=0.0)
        assert cost.transfer(action).seconds == pytest.approx(longest)
        slowest = cost.slowest_port(action)
        if seconds:
            found = bytes_at[slowest] * network.link(slowest)[0] + network.link(slowest)[1]
            assert found == pytest.approx(max(seconds))


@given(costs())
def test_ports_follow_from_who_attends_and_who_hosts(given: tuple[LayoutCost, Load]) -> None:
    cost, network = given[0], given[0].cost.network
    for action in transfers(cost.layout):
        pairs = itertools.product(cost.layout.attending, cost.layout.hosting(action.layer))
        both = [pair if action.towards_experts else pair[::-1] for pair in pairs if pair[0] != pair[1]]
        expected = {int(port) for pair in both for port in (network.out_port[pair], network.in_port[pair])}
        assert cost.transfer(action).ports == tuple(sorted(expected))


@given(costs())
def test_an_expert_gets_the_rows_of_all_ranks_and_a_replica_its_own(given: tuple[LayoutCost, Load]) -> None:
    cost, load = given
    for layer, j in itertools.product(range(cost.layout.layers), range(cost.layout.micro_batches)):
        rows, placement = load(layer, j), cost.layout.placement[layer]
        for rank, sequences in enumerate(cost.layout.sequences_per_rank):
            expected = [sum(rows[:, expert].tolist()) for expert in placement.experts[rank]]
            expected += [float(rows[rank, expert]) for expert in placement.replicated if sequences]
            assert cost.expert_rows(rank, layer, j) == pytest.approx(expected)


@given(costs())
def test_seconds_by_rank_are_the_seconds_of_each(given: tuple[LayoutCost, Load]) -> None:
    cost, layout = given[0], given[0].layout
    for kind, direction in itertools.product((Kind.ATTENTION, Kind.EXPERT, Kind.HEAD, Kind.OPTIMIZER), Pass):
        for layer, j in itertools.product(range(layout.layers), range(layout.micro_batches)):
            action = Action(kind, direction, layer, j)
            expected = [cost.seconds(rank, action) for rank in range(layout.world_size)]
            assert cost.seconds_by_rank(action).tolist() == expected
