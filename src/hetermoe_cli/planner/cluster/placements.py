"""Placements of one choice: levelled whole experts per class, and mixtures of layers when there are many layers.

A row is one layer's experts by class. A model of few layers is timed in full. Of a longer one rows are timed, each
repeated over a few layers, and an integer program says how many layers take which row, within the devices' memory.
"""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pulp

from hetermoe_cli.planner.arrays import FloatArray, IntArray
from hetermoe_cli.planner.instance.counts import counts_of, fits
from hetermoe_cli.planner.instance.rates import Rates
from hetermoe_cli.planner.solver import SolverOptions, solve_problem

MOST_STEPS = 64  # experts of one layer on a device that are tried
MOST_CLASSES = 6  # whose subsets are tried
MARGINS = (1.0, 0.97, 0.9, 0.8)  # shares of the memory that mixtures may fill: counts are rounded up later
SECONDS = 1.0  # for one integer program; they take milliseconds


def placements(rates: Rates) -> IntArray:
    """[n, layers, classes + 1] levelled placements: over all devices, those that do not attend, those that do; by
    compute alone or by the slower of compute and network; layer by layer after a running share, or the same in every
    layer; in steps of one expert or of one per device."""
    attends = [c.attends for c in rates.classes]
    found, room = [], np.floor(_room(rates) / rates.layers)
    for load in _loads(rates):
        for allowed in ([True] * len(attends), [not a for a in attends], attends):
            share = _levelled(rates, load, allowed)
            if share.sum() >= rates.layers * rates.experts * (1 - 1e-9):
                for even, steady in product((False, True), (False, True)):
                    table = _whole(rates, share, even, steady)
                    found += [] if table is None else [table]
            found += [np.repeat(row[None], rates.layers, axis=0) for row in _quantised(rates, load, allowed, room)]
    return (
        np.unique(np.array(found), axis=0) if found else np.zeros((0, rates.layers, len(attends) + 1), dtype=np.int64)
    )


def _room(rates: Rates) -> FloatArray:
    """[classes] experts of all layers that a device's memory holds, with one layer that has one more than the mean."""
    return np.array([max(0, int(r.room(rates.layers, wider=1))) for r in rates.of])


Load = tuple[FloatArray, FloatArray]


def _loads(rates: Rates) -> list[Load]:
    """[classes] seconds a layer and micro-batch without experts, and of one expert: compute alone, or network."""
    base = np.array(
        [
            r.attending(rates.layers) / rates.layers if c.attends else 0.0
            for c, r in zip(rates.classes, rates.of, strict=True)
        ]
    )
    each = np.array([sum(r.hosted) for r in rates.of])
    moved = [
        max((port.bytes_per_expert[c] * port.byte_seconds for port in rates.ports if port.devices), default=0.0)
        for c in range(len(each))
    ]
    usual = rates.cost.travelling_share(rates.experts / sum(rates.sizes))
    return [(base, each), (base, np.maximum(each, 2 * usual * np.array(moved)))]


def _levelled(rates: Rates, load: Load, allowed: list[bool]) -> FloatArray:
    """[classes] experts of all layers that level the devices' load, within their memory."""
    base, each = load
    sizes = np.array(rates.sizes) * np.array(allowed)
    room, wanted = _room(rates), rates.layers * rates.experts
    low, high = 0.0, float(base.max() + rates.experts * each.max())
    for _ in range(50):
        middle = (low + high) / 2
        held = (sizes * np.clip(rates.layers * (middle - base) / each, 0, room)).sum()
        low, high = (low, middle) if held >= wanted else (middle, high)
    result: FloatArray = sizes * np.clip(rates.layers * (high - base) / each, 0, room)
    return result


def _quantised(rates: Rates, load: Load, allowed: list[bool], room: FloatArray) -> Iterator[IntArray]:
    """[classes + 1] one layer's experts: the least time in which whole experts per device find a place, if any does."""
    base, each = load
    sizes, most = np.array(rates.sizes), np.where(allowed, room, 0)
    steps = np.arange(1, min(rates.experts, MOST_STEPS) + 1)
    for time in np.unique(np.concatenate([b + e * steps for b, e in zip(base, each, strict=True)])):
        counts = np.clip(np.floor((time - base) / each + 1e-9), 0, most).astype(np.int64) * sizes
        if counts.sum() >= rates.experts:
            yield _trimmed(counts, base, each, sizes, rates.experts)
            return


def _trimmed(counts: IntArray, base: FloatArray, each: FloatArray, sizes: IntArray, experts: int) -> IntArray:
    """Take what is too much from the classes that end last."""
    counts = counts.copy()
    while (over := int(counts.sum()) - experts) > 0:
        load = np.where(counts > 0, base + each * np.ceil(counts / sizes), -np.inf)
        last = int(load.argmax())
        top = int(counts[last] - (np.ceil(counts[last] / sizes[last]) - 1) * sizes[last])
        counts[last] -= min(over, max(1, top))
    return np.append(counts, 0)


def _whole(rates: Rates, share: FloatArray, even: bool, steady: bool) -> IntArray | None:
    """Whole experts per layer; None where steps of a class's size cannot give them."""
    steps = np.array([c.count if even else 1 for c in rates.classes])
    wanted = share * (rates.experts / share.sum())
    table = np.zeros((rates.layers, len(share) + 1), dtype=np.int64)
    given = np.zeros(len(share))
    for layer in range(rates.layers):
        target = wanted if steady else wanted * (layer + 1) - given
        row = _fill(target, steps, rates.experts)
        if row is None:
            return None
        table[layer, :-1] = row
        given += row
    return table


def _fill(target: FloatArray, steps: IntArray, experts: int) -> IntArray | None:
    """Whole numbers near `target` in `steps`, the last step of a class cut where the sum would be too large."""
    result: IntArray = (np.floor(np.maximum(target, 0) / steps + 1e-9) * steps).astype(np.int64)
    while result.sum() > experts:
        most = int(np.argmax(np.where(result > 0, result - target, -np.inf)))
        result[most] = max(0, result[most] - steps[most])
    while (left := experts - int(result.sum())) > 0:
        wanted = np.where(target > 0, (target - result) / steps, -np.inf)
        if not np.isfinite(wanted).any():
            return None
        lagging = int(np.argmax(wanted))
        result[lagging] += min(left, int(steps[lagging]))
    return result


def rows(rates: Rates) -> IntArray:
    """[n, classes + 1] whole experts levelled over any of the classes, by compute alone or with the network."""
    sizes = rates.sizes
    numbers = range(len(sizes))
    if len(sizes) <= MOST_CLASSES:
        subsets = [[bool(mask >> c & 1) for c in numbers] for mask in range(1, 1 << len(sizes))]
    else:
        subsets = [[c != out for c in numbers] for out in [-1, *numbers]]
    found = [
        row
        for load in _loads(rates)
        for allowed in subsets
        for row in _quantised(rates, load, allowed, room=np.full(len(sizes), np.inf))
    ]
    return np.unique(np.array(found), axis=0)


def mixture(rates: Rates, pool: IntArray, seconds: FloatArray) -> IntArray | None:
    """[layers, classes + 1] the rows of `pool`, each lasting `seconds`, that take least time together and fit."""
    for margin in MARGINS:
        numbers = _numbers(rates, pool, seconds, margin)
        if numbers is None:
            return None
        table = _spread(pool, numbers)
        if fits(rates, counts_of(rates, table)):
            return table
    return None


def _numbers(rates: Rates, pool: IntArray, seconds: FloatArray, margin: float) -> list[int] | None:
    """How many layers take each row."""
    problem = pulp.LpProblem("mixture", pulp.LpMinimize)
    numbers = [problem.add_variable(f"n{index}", 0, rates.layers, cat="Integer") for index in range(len(pool))]
    scale = 1 / float(seconds.min())
    problem.setObjective(pulp.lpSum(n * float(s * scale) for n, s in zip(numbers, seconds, strict=True)))
    problem.addConstraint(pulp.lpSum(numbers) == rates.layers)
    for index, (c, room) in enumerate(zip(rates.classes, _room(rates), strict=True)):
        held = pulp.lpSum(n * int(row[index]) for n, row in zip(numbers, pool, strict=True))
        problem.addConstraint(held <= float(margin * room * c.count))
    run = solve_problem(problem, SolverOptions(time_limit=SECONDS))
    if run.status not in ("optimal", "feasible"):
        return None
    return [round(n.value() or 0) for n in numbers]


def _spread(pool: IntArray, numbers: list[int]) -> IntArray:
    """[layers, classes + 1] each row as evenly over the layers as can be."""
    places = [((turn + 0.5) / count, index) for index, count in enumerate(numbers) for turn in range(count)]
    return pool[[index for _, index in sorted(places)]]
