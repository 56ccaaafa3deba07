"""The planner against brute force on random instances: several nodes, shared NICs, latencies, memory that binds."""

import random
from itertools import product
from math import inf

import pytest
from instances import random_inputs

from builders import make_schedule
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.allowed import recompute_choices
from hetermoe_cli.planner.cluster.objective import Wanted
from hetermoe_cli.planner.instance.deal import number
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import LayerPlacement, Layout

pytestmark = pytest.mark.usefixtures("within_bounds")

GAP = 1e-5


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(total,)]
    return [(first, *rest) for first in range(total + 1) for rest in compositions(total - first, parts - 1)]


def brute_force(inputs: Inputs) -> float:
    """Seconds of the fastest layout that fits; recomputation only where the layout does not fit without."""
    cost, batch = CostModel(inputs), inputs.train.global_batch_sequences
    world = len(cost.devices)
    rows: list[LayerPlacement] = [number(row[:-1], row[-1]) for row in compositions(inputs.model.experts, world + 1)]
    best = inf
    for count, name in product([r for r in range(1, batch + 1) if batch % r == 0], ("zebra", "sequential")):
        for sequences in compositions(batch // count, world):
            for placement in product(rows, repeat=inputs.model.layers):
                for recompute in recompute_choices(cost):
                    schedule = make_schedule(name, count, recompute=recompute, dispatch=inputs.train.dispatch)
                    layout = Layout.model_construct(
                        schedule=schedule, sequences_per_rank=list(sequences), placement=list(placement)
                    )
                    found = LayoutCost(cost, layout)
                    memories = [found.memory(rank) for rank in range(world)]
                    limit = inputs.train.memory_headroom
                    if all(m.total_bytes <= m.capacity_bytes * limit for m in memories):
                        best = min(best, simulate(found).seconds)
                        break
    return best


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(s, marks=pytest.mark.long) for s in range(8, 20))])
def test_equals_brute_force_on_random_instances(seed: int) -> None:
    rng = random.Random(seed)
    devices, layers = rng.choice([(2, 2), (2, 1), (3, 1), (3, 1)])
    inputs = random_inputs(
        rng, devices=devices, layers=layers, experts=rng.choice([2, 3]), batch=rng.choice([2, 3, 4]), tight=True,
        dense_layers=seed // 24,
    )  # fmt: skip
    best = brute_force(inputs)
    options = PlanOptions(solver=SolverOptions(relative_gap=GAP), wanted=Wanted(most_groups=1))
    if best == inf:
        with pytest.raises(UserError, match="does not fit") as caught:
            make_plan(inputs, options)
        assert caught.value.code is ExitCode.DOES_NOT_FIT
        return
    plan = make_plan(inputs, options)
    assert best * (1 - 1e-9) <= plan.predicted.iteration_seconds <= best * (1 + 2 * GAP)
    assert plan.bound.iteration_seconds <= best * (1 + 1e-9)
    assert plan.bound.exact_over == "devices"


@pytest.mark.parametrize(
    "seed", [*range(200, 205), *(pytest.param(s, marks=pytest.mark.long) for s in range(205, 212))]
)
def test_rows_once_per_device(seed: int) -> None:
    """No bound is above what brute force finds, and plans come close: they count such rows where they compare."""
    rng = random.Random(seed)
    inputs = random_inputs(
        rng, devices=rng.choice([2, 3]), layers=1, experts=4, batch=rng.choice([2, 3]), top_k=rng.choice([2, 3]),
        dispatch="per_device",
    )  # fmt: skip
    best, plan = (
        brute_force(inputs),
        make_plan(inputs, PlanOptions(solver=SolverOptions(relative_gap=GAP), wanted=Wanted(most_groups=1))),
    )
    assert plan.layout.schedule.dispatch == "per_device"
    assert best * (1 - 1e-9) <= plan.predicted.iteration_seconds <= 1.05 * best
    assert plan.predicted.iteration_seconds == pytest.approx(
        simulate(LayoutCost(CostModel(inputs), plan.layout)).seconds
    )
    assert plan.bound.iteration_seconds <= best * (1 + 1e-9)


@pytest.mark.parametrize(
    "seed", [*range(100, 104), *(pytest.param(s, marks=pytest.mark.long) for s in range(104, 108))]
)
def test_equals_brute_force_where_types_share_a_machine(seed: int) -> None:
    rng = random.Random(seed)
    inputs = random_inputs(rng, devices=3, layers=1, experts=3, batch=rng.choice([2, 3]), flat=True)
    nodes = [
        node.model_copy(update={"machine": "box"} if index else {}) for index, node in enumerate(inputs.cluster.nodes)
    ]
    inputs = inputs.model_copy(update={"cluster": inputs.cluster.model_copy(update={"nodes": nodes})})
    best = brute_force(inputs)
    plan = make_plan(inputs, PlanOptions(solver=SolverOptions(relative_gap=GAP), wanted=Wanted(most_groups=1)))
    assert best * (1 - 1e-9) <= plan.predicted.iteration_seconds <= best * (1 + 2 * GAP)
    assert plan.bound.iteration_seconds <= best * (1 + 1e-9)
