"""Class-level times and memory against simulator and cost model: exact where classes are even, never below else."""

import random
from dataclasses import replace

import numpy as np
import pytest
from instances import random_choice, random_counts, random_inputs

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.instance.choice import ALL
from hetermoe_cli.planner.instance.counts import Counts, counts_of, fits, seconds, transfer_seconds
from hetermoe_cli.planner.instance.prepared import Prepared
from hetermoe_cli.planner.orders import other_schedules
from hetermoe_cli.planner.replay import busy_bound, overflow
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.simulator import simulate


def random_ready(rng: random.Random, apart: int, *, any_order: bool = False) -> Prepared:
    devices, layers, experts = rng.randint(1, 6), rng.randint(1, 3), rng.randint(1, 7)
    choice = random_choice(rng, devices)
    if any_order:
        schedules = [choice.schedule, *other_schedules(choice.schedule)]
        choice = replace(choice, schedule=rng.choice(schedules))
    batch = sum(choice.sequences) * choice.schedule.micro_batches
    inputs = random_inputs(rng, devices=devices, layers=layers, experts=experts, batch=batch, tight=True)
    return Prepared.of(CostModel(inputs), choice, apart)


def class_counts(rng: random.Random, ready: Prepared) -> Counts:
    """Experts per class drawn at random."""
    rows = np.array(random_counts(rng, len(ready.classes), ready.rates.layers, ready.rates.experts))
    return counts_of(ready.rates, rows)


@pytest.mark.parametrize("seed", range(60))
def test_class_level_time_and_memory(seed: int) -> None:
    """In every order of experts and transfers."""
    rng = random.Random(seed)
    ready = random_ready(rng, apart=(0, 1, ALL)[seed % 3], any_order=seed >= 20)
    for _ in range(5):
        counts = class_counts(rng, ready)
        cost = LayoutCost(ready.rates.cost, ready.layout(counts))
        replay, time = simulate(cost).seconds, float(seconds(ready.rates, ready.graph, counts))
        assert replay <= time * (1 + 1e-9)
        if not counts.spare.any():
            assert time == pytest.approx(replay, rel=1e-9)
            lengths = [
                cost.transfer(Action(Kind.DISPATCH, Pass.FORWARD, layer)).seconds for layer in range(ready.rates.layers)
            ]
            assert transfer_seconds(ready.rates, counts) == pytest.approx(np.array(lengths), rel=1e-9)
        assert bool(fits(ready.rates, counts)) == (overflow(cost) is None)
        if not counts.replicated.any():  # only rivals ask for it, and they replicate nothing
            assert busy_bound(cost) <= replay * (1 + 1e-9)


def test_remainders_rotate_so_that_memory_evens_out() -> None:
    rng = random.Random(3)
    for _ in range(20):
        ready = random_ready(rng, apart=0)
        counts = class_counts(rng, ready)
        layout = ready.layout(counts)
        for device_class in ready.classes:
            held = [sum(len(p.experts[rank]) for p in layout.placement) for rank in device_class.ranks]
            assert max(held) - min(held) <= 1
            for placement in layout.placement:
                sizes = [len(placement.experts[rank]) for rank in device_class.ranks]
                assert max(sizes) - min(sizes) <= 1
