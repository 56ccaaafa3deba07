"""The critical path covers the iteration without gaps, and names the resource that is known to bind."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import layouts, make_cost, make_layout, make_model, make_profile
from hetermoe_cli.planner.reasons.critical_path import critical_path, shares
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.trace import display_name


def link(bandwidth: float, latency: float = 0.0) -> Link:
    return Link(bandwidth_gigabytes_per_second=bandwidth, latency_microseconds=latency)


def found(layout: Layout, nodes: Sequence[tuple[str, int]] | None = None, **inputs: Any) -> dict[str, float]:
    cost = make_cost(layout, nodes, **inputs)
    return shares(cost, critical_path(cost))


@given(layout=layouts(), bandwidth=st.sampled_from([1e-6, 1e-4, 1.0]), latency=st.sampled_from([0.0, 1e5, 1e6]))
def test_the_path_is_a_chain_of_tasks_without_waiting(layout: Layout, bandwidth: float, latency: float) -> None:
    nodes = [("new" if rank % 2 else "old", 1 + rank % 2) for rank in range(layout.world_size)]
    while sum(count for _, count in nodes) > layout.world_size:
        nodes.pop()
    nodes += [("new", 1)] * (layout.world_size - sum(count for _, count in nodes))
    cost = make_cost(layout, nodes, network=link(bandwidth, latency), interconnect=link(10 * bandwidth))
    trace = simulate(cost)
    steps = critical_path(cost)
    spans = {(span.rank, span.name): span for span in trace.spans}
    transfers = {span.name: span for span in trace.spans if span.lane != "compute"}
    assert steps[0].start == 0.0
    assert steps[-1].end == trace.seconds
    for step, following in pairwise(steps):
        assert step.end == following.start
    for step in steps:
        name = display_name(step.action)
        span = transfers[name] if step.action.is_transfer else spans[step.rank, name]
        assert (step.start, step.end) == (span.start, span.end)
    path = shares(cost, steps)
    assert sum(path.values()) == pytest.approx(1.0)
    assert list(path.values()) == sorted(path.values(), reverse=True)


def test_one_micro_batch_and_one_layer_lie_on_the_path_as_a_whole() -> None:
    layout = make_layout((1, 0), (0, 4), layers=1, micro_batches=1)
    cost = make_cost(layout, [("new", 1), ("old", 1)])
    seconds = {name: share * simulate(cost).seconds for name, share in shares(cost, critical_path(cost)).items()}
    assert seconds["attention of new"] == pytest.approx(1.0 + 2.0)
    assert seconds["experts of old"] == pytest.approx(3 * 64 * 0.02)  # every token once, backward twice as long
    assert seconds["head of new"] == pytest.approx(3 * 64 * 0.005)
    assert seconds["NIC of node0"] == pytest.approx(4 * 64 * 64 * 2 / 1e9)  # four times 64 rows of 64 halves


SLOW_EXPERTS = {"old": make_profile("old", expert_seconds=1.0), "new": make_profile("new")}
SLOW_HEAD = {"new": make_profile("new", head_seconds=1.0)}
SLOW_STEP = {"new": make_profile("new", optimizer_seconds_per_parameter=1.0)}


@pytest.mark.parametrize(
    ("layout", "nodes", "inputs", "binding"),
    [
        (make_layout((1, 0), (0, 4)), [("new", 1), ("old", 1)], {"profiles": SLOW_EXPERTS}, "experts of old"),
        (make_layout((1, 0), (2, 2)), [("old", 1), ("new", 1)], {}, "attention of old"),
        (make_layout((1, 1), (2, 2)), None, {"profiles": SLOW_HEAD}, "head of new"),
        (make_layout((1, 1), (2, 2)), None, {"profiles": SLOW_STEP}, "optimizer of new"),
        (make_layout((1, 0, 0), (0, 2, 2)), None, {"network": link(1e-6)}, "NIC of node0"),  # sends to both others
        (make_layout((1, 1, 0), (0, 0, 4)), None, {"network": link(1e-6)}, "NIC of node2"),  # receives from both
        (make_layout((1, 0), (0, 4)), [("new", 2)], {"interconnect": link(1e-6)}, "interconnect of new"),
        (make_layout((1, 1), (0, 0), replicated=4), None, {"network": link(1e-6)}, "synchronisation"),
    ],
)
def test_the_binding_resource_where_it_is_known(
    layout: Layout, nodes: list[tuple[str, int]] | None, inputs: dict[str, Any], binding: str
) -> None:
    path = found(layout, nodes, model=make_model(), **inputs)
    assert next(iter(path)) == binding
    assert path[binding] > 0.5
