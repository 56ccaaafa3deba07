"""Chains and their potentials: what they know of contention, and that better ones stay below every replay."""

import random
from typing import Any

import numpy as np
import pytest
from instances import random_choice, random_counts, random_inputs

from builders import make_inputs, make_model, make_profile, make_schedule
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.bounds.borders import CREDIT, HELD, PORT, REDUCED
from hetermoe_cli.planner.bounds.chains import canonical
from hetermoe_cli.planner.bounds.master import mixture
from hetermoe_cli.planner.bounds.patterns import Patterns, caps_within
from hetermoe_cli.planner.bounds.potentials import better_chains
from hetermoe_cli.planner.bounds.rows import Of, Rows
from hetermoe_cli.planner.instance.choice import Choice
from hetermoe_cli.planner.instance.counts import counts_of
from hetermoe_cli.planner.instance.deal import number
from hetermoe_cli.planner.instance.prepared import Prepared
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link


def prepared(*, bandwidth: float, layers: int = 6, experts: int = 4, window: int = 0) -> Prepared:
    """Two attending devices and two hosts, a node each; links of `bandwidth` GB/s."""
    model = make_model(layers=layers, experts=experts)
    rest: dict[str, Any] = {"model": model, "head_seconds": 1e-4, "optimizer_seconds_per_parameter": 1e-12}
    profiles = {
        "new": make_profile("new", attention_seconds=0.02, expert_seconds=1e-4, **rest),
        "old": make_profile("old", attention_seconds=1.0, expert_seconds=2e-4, **rest),
    }
    link = Link(bandwidth_gigabytes_per_second=bandwidth, latency_microseconds=0)
    inputs = make_inputs(
        [("new", 1), ("new", 1), ("old", 1), ("old", 1)],
        model=model,
        profiles=profiles,
        global_batch_sequences=8,
        network=link,
        interconnect=link,
    )
    schedule = make_schedule("zebra", 4)
    if window:
        schedule = schedule.model_copy(update={"window": window})
    return Prepared.of(CostModel(inputs), Choice(schedule, (1, 1, 0, 0)))


def replay(ready: Prepared, pattern: tuple[int, int, int], layers: int = 6) -> float:
    """Seconds of the layout whose layers all have experts on (attending, hosting) classes and copies."""
    counts = counts_of(ready.rates, np.tile(np.array(pattern), (layers, 1)))
    return simulate(LayoutCost(ready.rates.cost, ready.layout(counts))).seconds


def bound(ready: Prepared, pattern: tuple[int, int, int], without: set[int], layers: int = 6) -> float:
    """Seconds that chains prove for it if they never stand at some events."""
    caps, _ = caps_within(ready.rates, 1e9)
    patterns = Patterns(ready.rates, np.array([pattern[:-1]]).T, np.array([pattern[-1]]), tuple(caps))
    rows = Rows(patterns)
    rows.extend([c for c in canonical(rows.layers) if without.isdisjoint(event for event, _ in c.potentials)])
    every, last = rows.values
    sums = (layers - 1) * every[:, 0] + last[:, 0] + rows.constants
    return float(rows.makespan(sums) + sums[rows.index(Of.STEP)].max() + ready.rates.around_compute)


@pytest.mark.parametrize(
    ("bandwidth", "pattern", "events"),
    [
        pytest.param(0.001, (0, 2, 2), {REDUCED, CREDIT}, id="all-reduces"),
        pytest.param(0.0003, (2, 2, 0), {PORT, HELD}, id="answers, where attending devices host"),
    ],
)
def test_chains_know_what_holds_up_rows(bandwidth: float, pattern: tuple[int, int, int], events: set[int]) -> None:
    ready = prepared(bandwidth=bandwidth)
    plain, better = bound(ready, pattern, events), bound(ready, pattern, set())
    seconds = replay(ready, pattern)
    assert plain < better <= seconds * (1 + 1e-9)
    assert better > 0.9 * seconds


@pytest.mark.parametrize("pattern", [(0, 4, 0), (1, 3, 0), (0, 3, 1)], ids=str)
@pytest.mark.parametrize("micro_batches", [4, 8, 16])
@pytest.mark.parametrize("layers", [2, 3, 6])
def test_chains_hold_where_attention_takes_as_long_as_a_transfer(
    layers: int, micro_batches: int, pattern: tuple[int, int, int]
) -> None:
    """Bounds of the lanes had begun when the last message can go out, not the first: up to 7 % above a replay."""
    for attention in (0.01, 0.02, 0.04, 0.08):  # a transfer takes 0.04 to 0.055 s
        model = make_model(layers=layers, experts=4)
        profiles = {
            name: make_profile(name, model=model, attention_seconds=attention, expert_seconds=1e-6, head_seconds=1e-4)
            for name in ("new", "old")
        }
        link = Link(bandwidth_gigabytes_per_second=3e-4, latency_microseconds=0)
        inputs = make_inputs(
            [("new", 1), ("old", 1)],
            model=model,
            profiles=profiles,
            global_batch_sequences=micro_batches,
            network=link,
            interconnect=link,
        )
        ready = Prepared.of(CostModel(inputs), Choice(make_schedule("zebra", micro_batches), (1, 0)))
        assert bound(ready, pattern, set(), layers) <= replay(ready, pattern, layers) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_better_chains_are_longer_and_stay_below_the_replay(seed: int) -> None:
    rng = random.Random(seed)
    devices, layers, experts = rng.randint(2, 5), rng.randint(2, 5), rng.randint(2, 6)
    choice = random_choice(rng, devices)
    batch = sum(choice.sequences) * choice.schedule.micro_batches
    cost = CostModel(random_inputs(rng, devices=devices, layers=layers, experts=experts, batch=batch, flat=True))
    ready = Prepared.of(cost, choice)
    counts = random_counts(rng, devices, layers, experts)
    totals = np.array([[sum(row[rank] for rank in c.ranks) for row in counts] for c in ready.classes])
    copies = np.array([row[-1] for row in counts])
    layout = choice.layout([number(row[:-1], row[-1]) for row in counts])
    seconds = simulate(LayoutCost(cost, layout)).seconds
    caps, _ = caps_within(ready.rates, seconds)
    rows = Rows(Patterns(ready.rates, totals, copies, tuple(caps)))
    rows.extend(canonical(rows.layers))
    every, last = np.ones(layers), np.zeros(layers)
    every[-1], last[-1] = 0.0, 1.0
    before = _makespan(rows, every, last)
    for _ in range(3):
        chains = better_chains(rows, every, last)
        if not chains:
            break
        known = len(rows.rows)
        rows.extend(chains)
        lengths = _sums(rows, every, last)
        for chain, length in zip(chains, lengths[known:], strict=True):
            assert length > max(lengths[i] for i in rows.index(Of.CHAIN, chain.family, chain.part) if i < known)
    assert before <= _makespan(rows, every, last) <= seconds * (1 + 1e-9)


def test_better_chains_raise_the_bound_of_a_mixture() -> None:
    ready = prepared(bandwidth=0.0003, experts=8, window=2)
    horizon = replay(ready, (4, 4, 0))
    plain, mixed = mixture(ready.rates, horizon), mixture(ready.rates, horizon, mixed=True)
    assert plain is not None
    assert mixed is not None
    assert plain.bound < mixed.bound <= horizon


def _sums(rows: Rows, every: np.ndarray, last: np.ndarray) -> np.ndarray:
    values = rows.values
    return values[0] @ every + values[1] @ last + rows.constants


def _makespan(rows: Rows, every: np.ndarray, last: np.ndarray) -> float:
    sums = _sums(rows, every, last)
    return float(rows.makespan(sums)) + rows.rates.around_compute
