"""Good placements of one choice without a solver: rounded shares of the work, improved by moving experts."""

import time
from collections.abc import Sequence
from itertools import combinations, product
from math import inf

import numpy as np

from hetermoe_cli.planner.arrays import FloatArray, IntArray
from hetermoe_cli.planner.bounds.master import Mixture, uniform
from hetermoe_cli.planner.instance.choice import DeviceClass
from hetermoe_cli.planner.instance.counts import counts_of, fits, seconds
from hetermoe_cli.planner.instance.graph import TaskGraph
from hetermoe_cli.planner.instance.rates import Rates
from hetermoe_cli.spec.layout import Layout

ROUNDS = 60
UNIFORM = 12
CLIMBS = 3
MANY = 12  # layers
HOPE = 1.15


def improve(rates: Rates, graph: TaskGraph, start: IntArray, known: float, deadline: float = inf) -> IntArray | None:
    """Best placement [layers, classes + 1] found from `start` [starts, layers, classes + 1]; the last column counts
    replicated experts.

    None where nothing that fits was found. Starts far above `known` seconds are not improved, and after `deadline`
    (time.monotonic) none is any further.
    """
    times = evaluate(rates, graph, start)
    moves = moves_of(rates)
    best, found = np.inf, start[0]
    for index in np.argsort(times, kind="stable")[:CLIMBS]:
        if times[index] < HOPE * min(known, times.min()):
            climbed = climb(rates, graph, moves, start[index], float(times[index]), deadline)
            best, found = min((best, found), climbed, key=lambda pair: pair[0])
    return found if np.isfinite(best) else None


def climb(
    rates: Rates, graph: TaskGraph, moves: IntArray, table: IntArray, reached: float, deadline: float
) -> tuple[float, IntArray]:
    """Seconds reached, and the placement: from `table`, which takes `reached`, by the best move until none helps."""
    for _ in range(ROUNDS):
        if time.monotonic() > deadline:
            break
        trials = np.concatenate([table + moves, _swaps(table), _repeats(table)])
        trials = trials[(trials >= 0).all((1, 2))]
        if not len(trials):
            break
        times = evaluate(rates, graph, trials)
        best = int(times.argmin())
        if not times[best] < reached * (1 - 1e-9):
            break
        table, reached = trials[best], float(times[best])
    return reached, table


def _swaps(table: IntArray) -> IntArray:
    """The same patterns with two different layers exchanged; of many layers those that lie 1, 2, 4 ... apart."""
    result, many = [], len(table) > MANY
    for first, second in combinations(range(len(table)), 2):
        apart = second - first
        if many and apart & (apart - 1):
            continue
        if (table[first] != table[second]).any():
            swapped = table.copy()
            swapped[[first, second]] = table[[second, first]]
            result.append(swapped)
    return np.array(result, dtype=np.int64).reshape(-1, *table.shape)


def _repeats(table: IntArray) -> IntArray:
    """One layer with the pattern of another."""
    patterns = np.unique(table, axis=0)
    result = []
    for layer, pattern in product(range(len(table)), patterns):
        if (table[layer] != pattern).any():
            changed = table.copy()
            changed[layer] = pattern
            result.append(changed)
    return np.array(result, dtype=np.int64).reshape(-1, *table.shape)


def table_in(classes: Sequence[DeviceClass], layout: Layout) -> IntArray:
    """[layers, classes + 1] what a layout's classes host together, and copies."""
    return np.array(
        [
            [*(sum(len(p.experts[rank]) for rank in c.ranks) for c in classes), len(p.replicated)]
            for p in layout.placement
        ]
    )


def evaluate(rates: Rates, graph: TaskGraph, table: IntArray) -> FloatArray:
    """[n] class-level seconds of [n, layers, classes + 1]; infinite where memory does not hold it."""
    result = np.full(len(table), np.inf)
    holds = fits(rates, counts_of(rates, table))
    if holds.any():
        result[holds] = seconds(rates, graph, counts_of(rates, table[holds]))
    return result


def moves_of(rates: Rates) -> IntArray:
    """Moves of experts from one place to another: single ones, and whole rows of a class; in one layer, and of many
    layers also in every second, fourth ... one and in all, as one at a time would take too many rounds."""
    sizes = [*rates.sizes, 1]
    moves = []
    for layers, source, target in product(_layer_sets(rates.layers), range(len(sizes)), range(len(sizes))):
        if source == target:
            continue
        for amount in {1, sizes[source], sizes[target]}:
            move = np.zeros((rates.layers, len(sizes)), dtype=np.int64)
            move[layers, source], move[layers, target] = -amount, amount
            moves.append(move)
    return np.array(moves)


def _layer_sets(layers: int) -> list[slice]:
    """Single layers, and of many those that lie a power of two apart."""
    stride, result = 1, [slice(layer, layer + 1) for layer in range(layers)]
    while layers > MANY and stride < layers:
        result += [slice(first, None, stride) for first in range(stride)]
        stride *= 2
    return result


def starts(rates: Rates, mixture: Mixture | None, horizon: float) -> IntArray:
    """First placements [n, layers, classes + 1]: the mixture's patterns spread over the layers, and levelled shares."""
    shares = [_balanced(rates, allowed) for allowed in _allowed(rates)]
    tables = [spread for share in shares for spread in _rounded(rates, share)]
    if mixture is not None and len(mixture.tables):
        tables += _ordered(rates, _spread(rates, mixture))
    tables += [np.repeat(pattern[None], rates.layers, axis=0) for pattern in uniform(rates, horizon, UNIFORM)]
    return np.unique(np.array(tables), axis=0)


def _spread(rates: Rates, mixture: Mixture) -> IntArray:
    """Patterns in proportion to their weights, each time the one that lags most."""
    given = np.zeros(len(mixture.weights))
    share = mixture.weights / mixture.weights.sum()
    rows = []
    for layer in range(rates.layers):
        lagging = int((share * (layer + 1) - given).argmax())
        given[lagging] += 1
        rows.append(mixture.tables[lagging])
    return np.array(rows)


def _ordered(rates: Rates, table: IntArray) -> list[IntArray]:
    """The same patterns in turn, and by what attending classes host, in both orders: changing costs time."""
    attending = [c.attends for c in rates.classes]
    order = np.argsort(table[:, :-1][:, attending].sum(1), kind="stable")
    return [table, table[order], table[order[::-1]]]


def _allowed(rates: Rates) -> list[list[bool]]:
    """Which classes may host: all, only those that do not attend, only those that do."""
    attends = [c.attends for c in rates.classes]
    options = [[True] * len(attends), [not a for a in attends], attends]
    return [option for option in options if any(option)]


def _balanced(rates: Rates, allowed: list[bool]) -> FloatArray:
    """Experts per class (all layers together) that level the devices' compute, by bisection; memory respected."""
    count = rates.choice.schedule.micro_batches
    base = np.array(
        [count * r.attending(rates.layers) if c.attends else 0.0 for c, r in zip(rates.classes, rates.of, strict=True)]
    )
    each = np.array([count * sum(r.hosted) for r in rates.of])
    room = np.array([max(0.0, r.room(rates.layers)) for r in rates.of])
    sizes = np.array(rates.sizes) * np.array(allowed)
    wanted = rates.layers * rates.experts
    low, high = 0.0, float(base.max() + wanted * each.max())
    for _ in range(50):
        middle = (low + high) / 2
        held = (sizes * np.clip((middle - base) / each, 0, room)).sum()
        low, high = (low, middle) if held >= wanted else (middle, high)
    share: FloatArray = sizes * np.clip((high - base) / each, 0, room)
    return share


def _rounded(rates: Rates, share: FloatArray) -> list[IntArray]:
    """Whole experts in every layer whose running sums follow the share, in steps of one or of a class's size."""
    total = share.sum()
    if total <= 0:
        return []
    share = share * (rates.layers * rates.experts / total)
    result = []
    for even in (False, True):
        table = np.zeros((rates.layers, len(share) + 1), dtype=np.int64)
        given = np.zeros(len(share))
        for layer in range(rates.layers):
            target = share * (layer + 1) / rates.layers - given
            table[layer, :-1] = _split(target, rates, even)
            table[layer, -1] = rates.experts - table[layer, :-1].sum()
            given += table[layer, :-1]
        result.append(table)
    return result


def _split(target: FloatArray, rates: Rates, even: bool) -> IntArray:
    """Whole numbers near `target` whose sum is the number of experts (less if only copies can fill it)."""
    steps = np.array([c.count if even else 1 for c in rates.classes])
    result: IntArray = (np.floor(np.maximum(target, 0) / steps + 1e-9) * steps).astype(np.int64)
    while result.sum() > rates.experts:
        most = int(np.argmax(np.where(result > 0, result - target, -np.inf)))
        result[most] = max(0, result[most] - steps[most])
    while True:
        left = rates.experts - result.sum()
        fitting = steps <= left
        wanted = np.where(fitting & (target > 0), target - result, -np.inf)
        if not np.isfinite(wanted).any():
            return result
        result[int(np.argmax(wanted))] += steps[int(np.argmax(wanted))]
