"""Groups under an expert load: placed by name, never slower than by number, within memory, replayed as predicted."""

import numpy as np
import pytest

from builders import make_inputs, make_model
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.objective import Wanted
from hetermoe_cli.planner.cluster.plan_groups import plan_groups
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.load import ExpertLoad
from hetermoe_cli.spec.plan import Plan


def plan(inputs: Inputs) -> Plan:
    return plan_groups(
        CostModel(inputs), inputs, SolverOptions(time_limit=4.0), 8, Wanted(most_groups=None, objective="time")
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.long) for s in (1, 2))])
def test_groups_place_experts_by_name(seed: int) -> None:
    model = make_model(layers=2, experts=6, top_k=1)
    inputs = make_inputs([("new", 2), ("old", 2), ("new", 2), ("old", 2)], model=model, global_batch_sequences=8)
    counts = np.random.default_rng(seed).integers(1, 100, (2, 6)).tolist()
    loaded = inputs.model_copy(update={"expert_load": ExpertLoad(layers=counts)})
    found = plan(loaded)
    assert found.load is not None
    seconds = found.predicted.iteration_seconds
    assert seconds <= (found.load.numbered_iteration_seconds or np.inf) * (1 + 1e-9)
    assert seconds == pytest.approx(replay_groups(found.inputs, found.groups).seconds)
    assert found.bound.iteration_seconds <= seconds * (1 + 1e-9)
    for memory in found.memory:
        assert memory.total_bytes <= memory.capacity_bytes * inputs.train.memory_headroom


def test_seconds_are_the_mean_over_samples() -> None:
    model = make_model(layers=2, experts=6, top_k=1)
    inputs = make_inputs([("new", 2), ("old", 2)], model=model, global_batch_sequences=4)
    samples = np.random.default_rng(0).integers(1, 100, (3, 2, 6))
    load = ExpertLoad(layers=samples.sum(axis=0).tolist(), samples=samples.tolist())
    found = plan(inputs.model_copy(update={"expert_load": load}))
    seconds = [replay_groups(step.inputs, found.groups, step).seconds for step in CostModel(found.inputs).steps]
    assert len(set(seconds)) > 1
    assert found.predicted.iteration_seconds == pytest.approx(np.mean(seconds))
