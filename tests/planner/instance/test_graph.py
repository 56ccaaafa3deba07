"""The task graph without the micro-batches in the middle of a window has the same makespan."""

import random

import numpy as np
import pytest
from instances import random_inputs

from builders import make_schedule
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.instance.choice import ALL, Choice
from hetermoe_cli.planner.instance.counts import counts_of, seconds
from hetermoe_cli.planner.instance.graph import coarse, task_graph
from hetermoe_cli.planner.instance.prepared import Prepared

PLACEMENTS = 12


def tables(rng: random.Random, layers: int, experts: int, places: int) -> np.ndarray:
    """[placements, layers, places] experts, layers often alike."""
    result = np.zeros((PLACEMENTS, layers, places), dtype=np.int64)
    for table in result:
        for layer in range(layers):
            if layer and rng.random() < 0.5:
                table[layer] = table[layer - 1]
                continue
            allowed = rng.sample(range(places), rng.randint(1, places))
            for _ in range(experts):
                table[layer, rng.choice(allowed)] += 1
    return result


@pytest.mark.parametrize("seed", range(60))
def test_middle_micro_batches_change_no_makespan(seed: int) -> None:
    rng = random.Random(seed)
    devices, layers, experts = rng.randint(2, 6), rng.randint(1, 5), rng.randint(2, 9)
    sequences = [1, *(rng.choice([0, 1, 2]) for _ in range(devices - 1))]
    choice = Choice(make_schedule(rng.choice(["zebra", "windowed"]), rng.choice([3, 4, 6, 8])), tuple(sequences))
    batch = sum(sequences) * choice.schedule.micro_batches
    cost = CostModel(
        random_inputs(rng, devices=devices, layers=layers, experts=experts, batch=batch, flat=seed % 2 > 0)
    )
    ready = Prepared.of(cost, choice, apart=ALL if seed % 3 == 0 else 0)
    found = tables(rng, layers, experts, len(ready.classes) + 1)
    counts = counts_of(ready.rates, found)
    full = task_graph(choice, ready.classes, layers)
    less = coarse(full, choice.schedule.window)
    assert len(less.tasks) < len(full.tasks) or choice.schedule.window < 3 + (full.reduced is not None)
    assert seconds(ready.rates, less, counts) == pytest.approx(seconds(ready.rates, full, counts), rel=1e-9)
