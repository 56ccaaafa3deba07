"""EP (Ideal): throughputs of the types alone, added; and the all-reduce that a real system would pay."""

import pytest

from builders import make_inputs, make_model, make_profile
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.baselines.even import ep
from hetermoe_cli.planner.baselines.ideal import ep_ideal, ep_ideal_charged, exchange_seconds
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs

BATCH = 8


def inputs(news: int, olds: int, *, old_memory: int = 10**10, batch: int = BATCH) -> Inputs:
    """Old devices take 3 times as long."""
    model = make_model(layers=2, experts=4)
    profiles = {
        "new": make_profile("new", model=model),
        "old": make_profile(
            "old",
            model=model,
            attention_seconds=3.0,
            expert_seconds=0.03,
            head_seconds=0.015,
            optimizer_seconds_per_parameter=3e-6,
            memory_bytes=old_memory,
        ),
    }
    nodes = [("new", 1)] * news + [("old", 1)] * olds
    kept = {name: profiles[name] for name, _ in nodes}
    return make_inputs(nodes, model=model, profiles=kept, global_batch_sequences=batch)


def sequences_per_second(news: int, olds: int) -> float:
    """The best of EP on one type alone at any batch that its devices share equally."""
    count = news + olds
    return max(
        batch / ep(CostModel(inputs(news, olds, batch=batch)), 16).seconds for batch in range(count, BATCH + 1, count)
    )


def test_throughputs_of_the_types_are_added() -> None:
    ideal = ep_ideal(CostModel(inputs(2, 3)), 16)
    assert ideal.layout is None
    assert ideal.seconds == pytest.approx(BATCH / (sequences_per_second(2, 0) + sequences_per_second(0, 3)))


def test_equal_types_with_a_third_of_the_speed_add_a_third() -> None:
    both, alone = ep_ideal(CostModel(inputs(1, 1)), 16), ep_ideal(CostModel(inputs(1, 0)), 16)
    assert both.seconds == pytest.approx(alone.seconds * 3 / 4)
    assert "new 75%, old 25%" in both.reason


def test_a_type_that_cannot_hold_the_model_adds_nothing() -> None:
    ideal = ep_ideal(CostModel(inputs(1, 1, old_memory=2_000_000)), 16)
    assert ideal.seconds == pytest.approx(ep_ideal(CostModel(inputs(1, 0)), 16).seconds)
    assert "old alone does not fit" in ideal.reason


def test_nothing_fits() -> None:
    base = inputs(0, 1, old_memory=2_000_000)
    ideal = ep_ideal(CostModel(base), 16)
    assert ideal.baseline().iteration_seconds is None
    assert "does not fit" in ideal.reason


def test_the_exchange_takes_all_gradients_once_over_the_slower_side() -> None:
    # 2 types: each sends 2 x 1/2 of all fp16 gradients. One old device receives and sends all of it at 1 GB/s.
    cost = CostModel(inputs(2, 1))
    assert exchange_seconds(cost, ["new", "old"]) == pytest.approx(2 * cost.model.parameters / 1e9)
    assert exchange_seconds(cost, ["new"]) == 0


def test_the_charge_is_the_exchange() -> None:
    cost = CostModel(inputs(2, 1))
    charge = ep_ideal_charged(cost, 16).seconds - ep_ideal(cost, 16).seconds
    assert charge == pytest.approx(exchange_seconds(cost, ["new", "old"]))


def test_without_overlap_messages_take_time_of_their_own() -> None:
    link = Link(bandwidth_gigabytes_per_second=1e-4, latency_microseconds=0.0)
    nodes = [node.model_copy(update={"network": link}) for node in inputs(2, 2).cluster.nodes]
    slow = inputs(2, 2).model_copy(update={"cluster": inputs(2, 2).cluster.model_copy(update={"nodes": nodes})})
    cost = CostModel(slow)
    assert ep_ideal(cost, 16, overlap="none").seconds > 1.02 * ep_ideal(cost, 16).seconds
