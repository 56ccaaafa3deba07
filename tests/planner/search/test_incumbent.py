"""Placements in every order of experts and transfers, and MILPs there, against plain replays and enumeration."""

import random
import time
from itertools import product
from math import inf

import numpy as np
import pytest
from instances import random_inputs
from test_small_instances import layer_placements

from builders import make_schedule
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.instance.choice import Choice
from hetermoe_cli.planner.instance.counts import counts_of
from hetermoe_cli.planner.instance.prepared import Prepared
from hetermoe_cli.planner.orders import other_orders, other_schedules
from hetermoe_cli.planner.search import heuristic
from hetermoe_cli.planner.search import incumbent as module
from hetermoe_cli.planner.search.candidates import Candidate, Listing
from hetermoe_cli.planner.search.incumbent import REFINED, Incumbent
from hetermoe_cli.planner.search.shake import shaken
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import Layout


def incumbent(cost: CostModel) -> Incumbent:
    """Nothing known yet, and more time than is needed."""
    return Incumbent(cost, SolverOptions(relative_gap=1e-5), time.monotonic() + 600)


def small_instance(seed: int) -> tuple[CostModel, Choice]:
    """A zebra of several micro-batches in flight on two to four devices."""
    rng = random.Random(seed)
    micro_batches, devices = rng.choice([3, 4, 6]), rng.randint(2, 4)
    sequences = (1, *(rng.choice([0, 0, 1]) for _ in range(devices - 1)))
    layers, experts, batch = rng.randint(2, 4), rng.randint(3, 8), sum(sequences) * micro_batches
    inputs = random_inputs(rng, devices=devices, layers=layers, experts=experts, batch=batch, flat=True)
    return CostModel(inputs), Choice(make_schedule("zebra", micro_batches), sequences)


def replayed_in_all_orders(cost: CostModel, choice: Choice) -> float:
    """The heuristic's placement for the default order, in the order that suits it best."""
    ready = Prepared.of(cost, choice)
    table = heuristic.improve(ready.rates, ready.tasks, heuristic.starts(ready.rates, None, ready.rates.serial), inf)
    assert table is not None
    layout = LayoutCost(cost, ready.layout(counts_of(ready.rates, table)))
    return min([simulate(layout).seconds, *(seconds for _, seconds in other_orders(layout))])


@pytest.mark.parametrize(("seed", "gain"), [(163, 0.12), (7, 0.10), (99, 0.08), (118, 0.05), (264, 0.05)])
def test_another_order_gets_placements_of_its_own(seed: int, gain: float) -> None:
    cost, choice = small_instance(seed)
    found = incumbent(cost)
    found.place(Candidate(0.0, choice), Prepared.of(cost, choice))
    assert found.seconds < replayed_in_all_orders(cost, choice) * (1 - gain)
    assert found.best is not None
    assert not found.best.schedule.in_default_order
    assert simulate(LayoutCost(cost, found.best)).seconds == found.seconds


def test_the_deadline_ends_a_climb() -> None:
    cost, choice = small_instance(163)
    ready = Prepared.of(cost, choice)
    starts = heuristic.starts(ready.rates, None, ready.rates.serial)
    late = heuristic.improve(ready.rates, ready.tasks, starts, inf, deadline=time.monotonic())
    whole = heuristic.improve(ready.rates, ready.tasks, starts, inf)
    assert late is not None
    assert whole is not None
    times = heuristic.evaluate(ready.rates, ready.tasks, np.array([late, whole]))
    assert times[0] == heuristic.evaluate(ready.rates, ready.tasks, starts).min() > times[1]


def test_the_fastest_uniform_choices_come_first() -> None:
    cost, _ = small_instance(7)
    uniform = Listing(cost, 16, inf).uniform
    assert all(candidate.uniform for candidate in uniform)
    found = incumbent(cost)
    found.seed(uniform)
    alone = [incumbent(cost) for _ in uniform]
    for one, candidate in zip(alone, uniform, strict=True):
        one.place(candidate, Prepared.of(cost, candidate.choice))
    assert found.seconds == min(one.seconds for one in alone)


@pytest.mark.parametrize("seed", range(6))
def test_milps_find_the_best_placement_of_an_order(seed: int) -> None:
    rng = random.Random(seed)
    inputs = random_inputs(rng, devices=3, layers=2, experts=3, batch=3, flat=True)
    cost, choice = CostModel(inputs), Choice(make_schedule("zebra", 3), (1, 0, 0))
    schedule = rng.choice(other_schedules(choice.schedule))
    placements = layer_placements(3, 3)
    layouts = [
        Layout(schedule=schedule, sequences_per_rank=[1, 0, 0], placement=list(layers))
        for layers in product(placements, repeat=2)
    ]
    times = [simulate(LayoutCost(cost, layout)).seconds for layout in layouts]
    found = incumbent(cost)
    found.offer(layouts[times.index(max(times))])
    in_order = Choice(schedule, choice.sequences)
    found.placed = {in_order: (found.seconds, layouts[0])}
    found.refine(inf)
    assert found.seconds <= min(times) * (1 + 2e-5)
    orders = [choice for choice in found.placed if not choice.schedule.in_default_order]
    problems = {(choice, tuple(Prepared.of(cost, choice, apart).classes)) for choice in orders for apart in REFINED}
    assert 0 < found.solved <= len(problems)  # none twice


@pytest.mark.parametrize(("seed", "gain"), [(70, 0.027), (7, 0.0), (99, 0.0), (163, 0.0)])
def test_shaken_placements_are_at_least_as_fast_as_climbed_ones(seed: int, gain: float) -> None:
    cost, choice = small_instance(seed)
    ready = Prepared.of(cost, choice)
    climbed = heuristic.improve(ready.rates, ready.tasks, heuristic.starts(ready.rates, None, ready.rates.serial), inf)
    assert climbed is not None
    better = shaken(ready.rates, ready.tasks, climbed, 20)
    before, after = heuristic.evaluate(ready.rates, ready.tasks, np.array([climbed, better]))
    assert after <= before * (1 - gain)
    assert (better.sum(1) == ready.rates.experts).all()
    assert (better >= 0).all()
    assert shaken(ready.rates, ready.tasks, climbed, 20, deadline=time.monotonic()) is climbed


def test_the_best_placements_are_shaken_in_their_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLIMBS", 20)
    cost, choice = small_instance(70)
    ready = Prepared.of(cost, choice)
    climbed = heuristic.improve(ready.rates, ready.tasks, heuristic.starts(ready.rates, None, ready.rates.serial), inf)
    assert climbed is not None
    found = incumbent(cost)
    layout = ready.layout(counts_of(ready.rates, climbed))
    before = found.offer(layout)
    assert (heuristic.table_in(ready.classes, layout) == climbed).all()
    found.placed = {choice: found.placed[choice]}
    found.seconds = before
    found.shake(inf)
    assert found.placed[choice][0] < before * (1 - 0.027)
