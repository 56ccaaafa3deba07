"""The planner against exhaustive enumeration of device-level layouts, using nothing but simulator and memory check."""

from collections.abc import Iterator
from itertools import product

import pytest

from builders import make_inputs, make_model, make_profile, make_schedule
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.allowed import recompute_choices
from hetermoe_cli.planner.cluster.objective import Wanted
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import LayerPlacement, Layout

pytestmark = pytest.mark.usefixtures("within_bounds")

TIGHT = PlanOptions(solver=SolverOptions(relative_gap=1e-5), wanted=Wanted(most_groups=1))


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as `parts` non-negative numbers."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def layer_placements(world: int, experts: int) -> list[LayerPlacement]:
    """Every (experts per rank, replicated) up to the experts' names: balanced loads make them alike."""
    result = []
    for counts in compositions(experts, world + 1):
        names = iter(range(experts))
        *hosted, replicated = [[next(names) for _ in range(count)] for count in counts]
        result.append(LayerPlacement(experts=hosted, replicated=replicated))
    return result


def brute_force(inputs: Inputs) -> float:
    """Seconds of the fastest layout that fits."""
    cost, model, train = CostModel(inputs), inputs.model, inputs.train
    world, batch = inputs.cluster.world_size, inputs.train.global_batch_sequences
    placements = layer_placements(world, model.experts)
    recomputes = recompute_choices(cost)
    best = float("inf")
    for micro_batches in (r for r in range(1, batch + 1) if batch % r == 0):
        for name, recompute in product(("zebra", "sequential"), recomputes):
            choice = make_schedule(name, micro_batches, recompute=recompute)
            for sequences in compositions(batch // micro_batches, world):
                for layers in product(placements, repeat=model.layers):
                    layout = Layout(schedule=choice, sequences_per_rank=sequences, placement=list(layers))
                    found = LayoutCost(cost, layout)
                    if all(
                        m.total_bytes <= m.capacity_bytes * train.memory_headroom
                        for m in map(found.memory, range(world))
                    ):
                        best = min(best, simulate(found).seconds)
    return best


def instance(
    nodes: tuple[tuple[str, int], ...],
    *,
    experts: int = 2,
    layers: int = 1,
    batch: int = 2,
    old: float = 3.0,
    old_experts: float = 1.2,
    memory: dict[str, int] | None = None,
    latency: float = 0.0,
    bandwidth: float = 0.1,
    recompute: str = "none",
    dense_layers: int = 0,
) -> Inputs:
    dense = {"dense_layers": dense_layers, "dense_ffn_size": 96} if dense_layers else {}
    model = make_model(layers=layers, experts=experts, top_k=1, **dense)
    link = Link(bandwidth_gigabytes_per_second=bandwidth, latency_microseconds=latency)
    profiles = {
        name: make_profile(
            name,
            model=model,
            attention_seconds=1e-3 * (old if name == "old" else 1.0),
            dense_seconds=1.4e-3 * (old if name == "old" else 1.0),
            expert_seconds=2.3e-5 * (old_experts if name == "old" else 1.0),
            head_seconds=2e-6,
            optimizer_seconds_per_parameter=1e-10,
            memory_bytes=(memory or {}).get(name, 10**10),
        )
        for name, _ in nodes
    }
    inputs = make_inputs(
        nodes, model=model, profiles=profiles, global_batch_sequences=batch, network=link, interconnect=link
    )
    return inputs.with_train(recompute=recompute)


PARAMETERS = 16 * make_model(layers=1, experts=4, top_k=1).parameters
CASES = {
    "1 new + 1 old": instance((("new", 1), ("old", 1)), experts=3, layers=2, batch=4),
    "1 new + 1 old, full recompute": instance((("new", 1), ("old", 1)), experts=3, batch=4, recompute="full"),
    "1 new + 1 old, recompute": instance((("new", 1), ("old", 1)), experts=3, batch=4, recompute="auto"),
    "1 new + 1 old, latency": instance((("new", 1), ("old", 1)), experts=3, layers=2, batch=2, latency=300.0),
    "2 equal": instance((("new", 1), ("new", 1)), experts=3, layers=2, batch=4),
    "2 equal, slow network": instance((("new", 1), ("new", 1)), experts=4, batch=4, bandwidth=0.002),
    "1 new + 2 old": instance((("new", 1), ("old", 2)), experts=3, batch=4),
    "2 new behind one NIC + 1 old": instance((("new", 2), ("old", 1)), experts=3, batch=4, bandwidth=0.02),
    "2 new + 2 old": instance((("new", 2), ("old", 2)), experts=3, batch=4, old=8.0),
    "3 types": instance((("new", 1), ("old", 1), ("older", 1)), experts=3, batch=4),
    "4 new + 4 old": instance((("new", 4), ("old", 4)), experts=2, batch=2, old=2.0),
    "3 new + 3 old, a NIC each": instance((("new", 1),) * 3 + (("old", 1),) * 3, experts=2, batch=2, old=1.5),
    "dense layer, full recompute": instance(
        (("new", 1), ("old", 1)), experts=3, layers=2, batch=4, dense_layers=1, recompute="full"
    ),
    "dense layer": instance((("new", 1), ("old", 1)), experts=3, layers=2, batch=4, dense_layers=1),
    "dense layers, recompute": instance(
        (("new", 2), ("old", 1)), experts=2, batch=4, dense_layers=2, recompute="auto", memory={"new": 2_200_000}
    ),
    "memory binds": instance((("new", 1), ("old", 1)), experts=4, batch=4, memory={"new": int(PARAMETERS * 0.75)}),
}


LONG = ("4 new + 4 old", "dense layer")  # 12 and 9 s


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in CASES])
def test_equals_brute_force(name: str) -> None:
    plan = make_plan(CASES[name], TIGHT)
    best = brute_force(CASES[name])
    assert plan.predicted.iteration_seconds == pytest.approx(best, rel=1e-4)
    assert plan.bound.iteration_seconds <= best * (1 + 1e-6)
    assert plan.bound.exact_over == "devices"
    assert plan.gap <= 1e-3
