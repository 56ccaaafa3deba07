"""Small clusters for the planner of groups."""

from collections.abc import Sequence
from typing import Any

from builders import make_inputs, make_model, make_profile
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs


def fleet(
    nodes: Sequence[tuple[str, int, int]] = (("new", 2, 2), ("old", 2, 2)),
    *,
    prices: Sequence[float | None] = (),
    nics: int = 2,
    bandwidth: float = 1.0,
    batch: int = 16,
    dense_state: str = "replicated",
    memory: int = 10**10,
    **model: Any,
) -> Inputs:
    """Node groups (type, nodes, devices a node). "old" is four times slower; links of `bandwidth` GB/s, 20 us."""
    config = make_model(**{"layers": 2, "experts": 8, "top_k": 1, **model})
    link = Link(bandwidth_gigabytes_per_second=bandwidth, latency_microseconds=20.0)
    profiles = {
        name: make_profile(
            name,
            model=config,
            attention_seconds=1e-3 * slow,
            expert_seconds=5e-5 * slow,
            head_seconds=1e-6 * slow,
            optimizer_seconds_per_parameter=1e-10,
            memory_bytes=memory,
        )
        for name, slow in (("new", 1.0), ("old", 4.0))
        if name in {node[0] for node in nodes}
    }
    inputs = make_inputs(
        [(device, each) for device, _, each in nodes],
        model=config,
        profiles=profiles,
        global_batch_sequences=batch,
        network=link,
        interconnect=link,
        nics=nics,
    )
    prices = prices or [None] * len(nodes)
    groups = [
        group.model_copy(update={"count": count, "price_per_hour": price})
        for group, (_, count, _), price in zip(inputs.cluster.nodes, nodes, prices, strict=True)
    ]
    cluster = inputs.cluster.model_copy(update={"nodes": groups})
    train = inputs.train.model_copy(update={"dense_state": dense_state})
    return inputs.model_copy(update={"cluster": cluster, "train": train})


def fleet_cost(*arguments: Any, **options: Any) -> CostModel:
    """Costs of a fleet."""
    return CostModel(fleet(*arguments, **options))
