"""All-to-alls in parts: against a hand calculation, and against the orders that overlap nothing or everything."""

import pytest

from builders import make_inputs, make_model, make_profile, sequential
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.baselines.even import ep
from hetermoe_cli.planner.baselines.parts import DEGREES, iteration_seconds, parted_seconds
from hetermoe_cli.planner.baselines.roles import dist_ep, find_roles, split_layout
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs

BOTH = (Pass.FORWARD, Pass.BACKWARD)


def inputs(batch: int = 8, bandwidth: float = 1e-4) -> Inputs:
    """Two new and two old devices; links so slow that messages take about as long as experts."""
    model = make_model(layers=3, experts=4, top_k=1)
    profiles = {
        "new": make_profile("new", model=model, attention_seconds=1.0, expert_seconds=0.01),
        "old": make_profile("old", model=model, attention_seconds=8.0, expert_seconds=0.02),
    }
    found = make_inputs(
        [("new", 1)] * 2 + [("old", 1)] * 2, model=model, profiles=profiles, global_batch_sequences=batch
    )
    link = Link(bandwidth_gigabytes_per_second=bandwidth, latency_microseconds=0.0)
    nodes = [node.model_copy(update={"network": link}) for node in found.cluster.nodes]
    train = found.train.model_copy(update={"recompute": "all"})
    return found.model_copy(update={"cluster": found.cluster.model_copy(update={"nodes": nodes}), "train": train})


def split(cost: CostModel, micro_batches: int) -> LayoutCost:
    """New devices attend, old ones host."""
    roles = find_roles(cost)
    assert roles is not None
    schedule = sequential(micro_batches, recompute="all")
    return LayoutCost(cost, split_layout(cost, roles, schedule, [0] * cost.model.layers))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_one_part_is_the_sequential_order(micro_batches: int) -> None:
    layout = split(CostModel(inputs()), micro_batches)
    assert iteration_seconds(layout, 1) == pytest.approx(simulate(layout).seconds)


@pytest.mark.parametrize("degree", [2, 4])
def test_a_layer_is_a_pipeline_of_its_parts(degree: int) -> None:
    layout = split(CostModel(inputs()), 1)
    host = layout.layout.hosting(0)[0]
    there = layout.transfer(Action(Kind.DISPATCH, Pass.FORWARD)).seconds / degree
    back = layout.transfer(Action(Kind.COMBINE, Pass.FORWARD)).seconds / degree
    saved = 0.0
    for direction in BOTH:
        experts = layout.seconds(host, Action(Kind.EXPERT, direction)) / degree
        pipeline = there + experts + back + (degree - 1) * max(there, experts, back)
        saved += degree * (there + experts + back) - pipeline
    expected = iteration_seconds(layout, 1) - layout.layout.layers * saved
    assert iteration_seconds(layout, degree) == pytest.approx(expected)


def test_attention_waits_for_all_parts() -> None:
    """However short experts and messages are, parts cannot hide attention behind them."""
    layout = split(CostModel(inputs(bandwidth=1.0)), 2)
    busy = 2 * sum(
        layout.seconds(rank, Action(kind, direction))
        for kind, rank in ((Kind.ATTENTION, 0), (Kind.EXPERT, 2))
        for direction in BOTH
    )
    assert parted_seconds(layout) > layout.layout.layers * busy


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_best_degree_is_taken(micro_batches: int) -> None:
    layout = split(CostModel(inputs()), micro_batches)
    assert parted_seconds(layout) == pytest.approx(min(iteration_seconds(layout, degree) for degree in DEGREES))


def test_parts_lie_between_no_overlap_and_that_of_micro_batches() -> None:
    cost = CostModel(inputs(batch=16))
    none, parts = ep(cost, 16, overlap="none"), ep(cost, 16, overlap="parts")
    assert parts.seconds < none.seconds
    assert ep(cost, 16, overlap="micro_batches").seconds <= parts.seconds
    assert dist_ep(cost, 16, overlap="parts").seconds < dist_ep(cost, 16).seconds
