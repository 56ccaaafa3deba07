"""The backward pass: how long a layer takes from border to border (borders.py)."""

import numpy as np

from hetermoe_cli.planner.arrays import BoolArray, FloatArray, choose, largest
from hetermoe_cli.planner.bounds.borders import (
    CREDIT,
    EARLY,
    FIRST,
    HELD,
    LAST,
    NONE,
    PORT,
    REDUCED,
    SAME,
    STREAM,
    Layer,
    Times,
    alias,
)
from hetermoe_cli.planner.bounds.sides import Side


def backward_times(side: Side) -> Times:
    """From border to border in the backward pass."""
    layer, n, d, slowest, longest = Layer(side), side.n, side.d, side.slowest, side.longest
    both, attention, expert = side.both, side.attention, side.expert
    layer.add(FIRST, FIRST, slowest + 2 * d + longest, side.most(both, d + n * expert + attention))
    layer.add(FIRST, FIRST, side.shared((n + 1) * d + slowest))
    layer.add(FIRST, LAST, 2 * d + n * longest, (n + 1) * d + longest, side.shared(2 * n * d))
    layer.add(FIRST, EARLY, 2 * d + longest + n * slowest, side.most(both, d + n * (expert + attention)))
    layer.add(EARLY, FIRST, d, side.most(both, d + expert + attention), side.shared(2 * d + slowest))
    layer.add(EARLY, LAST, 2 * d + longest, side.shared((n + 1) * d))
    layer.add(EARLY, EARLY, side.most(both, d + expert + n * attention), side.shared(2 * d + n * slowest))
    layer.add(LAST, LAST, n * d)
    for e in side.hosting:
        stream, mean = STREAM + e, side.mean[e]
        layer.add(FIRST, stream, d + n * mean)
        layer.add(EARLY, stream, d + mean)
        layer.add(stream, stream, n * mean)
        layer.add(stream, FIRST, mean + d + slowest)
        layer.add(stream, LAST, n * mean + d, mean + n * d)
        layer.add(stream, EARLY, mean + d + n * slowest)
        for c in side.attending:
            layer.add(stream, STREAM + c, mean + d + n * float(attention[c, 0]), n * mean + d + float(attention[c, 0]))
    for c in side.attending:
        _backward_stream(layer, c)
    _close_backward(layer)
    if side.patterns.rates.ring:
        _reduced(layer)
    return alias(side, layer.finish(_replicated_backward(side)))


def _backward_stream(layer: Layer, c: int) -> None:
    side, stream = layer.side, STREAM + c
    n, d, longest, mean, own = side.n, side.d, side.longest, side.mean[c], float(side.attention[c, 0])
    sure = side.all_host(c)
    layer.add(FIRST, stream, 2 * d + longest + n * own, 2 * d + n * longest + own, (n + 1) * d + longest + own)
    layer.add(FIRST, stream, choose(sure, d + n * (mean + own), NONE))
    layer.add(
        EARLY, stream, 2 * d + longest + own, choose(sure, d + mean + n * own, NONE), side.shared(2 * d + n * own)
    )
    layer.add(stream, FIRST, n * mean + own)
    layer.add(stream, EARLY, n * (mean + own))
    layer.add(stream, stream, n * (mean + own))
    layer.add(stream, LAST, choose(sure, n * mean + d, NONE))


def _close_backward(layer: Layer) -> None:
    """What follows from the order of the events themselves."""
    side = layer.side
    for before in {before for before, _ in layer.times}:
        layer.add(before, EARLY, layer.times.get((before, LAST), layer.none) + side.slowest)
        layer.add(before, EARLY, layer.times.get((before, FIRST), layer.none))
    for c in side.attending:
        layer.inherit(STREAM + c, EARLY)
    layer.inherit(FIRST, EARLY)
    if len(side.attending) == 1:  # else a replicated layer above leaves open whose last message it was
        layer.inherit(LAST, STREAM + side.attending[0], side.slowest)
    layer.inherit(LAST, EARLY, side.slowest)
    for e in side.hosting:
        layer.inherit(STREAM + e, LAST)
    layer.inherit(PORT, LAST)
    layer.inherit(PORT, FIRST, choose(side.patterns.contended, 0.0, NONE))
    layer.inherit(HELD, LAST)
    layer.inherit(HELD, FIRST, choose(side.patterns.held, 0.0, NONE))


def _replicated_backward(side: Side) -> Times:
    n, times = side.n, Times()
    whole = side.least(n * (side.attention + side.copies))
    early, end = side.least(n * side.copies + side.attention), side.least(side.attention + n * side.copies)
    times |= {(FIRST, FIRST): whole, (EARLY, EARLY): whole, (EARLY, FIRST): early}
    times |= {(last, LAST): end for last in SAME}
    for c in side.attending:
        own, copies = float(side.attention[c, 0]), side.copies[c]
        times[STREAM + c, STREAM + c] = times[STREAM + c, EARLY] = n * (own + copies)
        times[STREAM + c, FIRST] = n * copies + own
    for e in side.hosting:
        times[STREAM + e, STREAM + e] = 0 * whole
        times[STREAM + e, LAST] = end
    if len(side.attending) == 1:
        times |= _replicated_backward_alone(side)
    if side.patterns.rates.ring:
        times |= _reduced_alone(side)
    return times


def _replicated_backward_alone(side: Side) -> Times:
    """With one attending class every event is on its stream."""
    c = side.attending[0]
    n, own, copies, stream = side.n, float(side.attention[c, 0]), side.n * side.copies[c], STREAM + c
    times = Times()
    ends = {FIRST: copies + own, EARLY: copies + n * own, LAST: copies, stream: copies + n * own}
    for after, way in ends.items():
        times |= {(EARLY, after): way, (stream, after): way, (FIRST, after): way + (n - 1) * own}
        times |= {(last, after): way + own for last in SAME}
        times |= {(STREAM + e, after): way + own for e in side.hosting}
    return times


def least_reduce(side: Side) -> float:
    """Least seconds of the all-reduce of a layer above layer 0 without replicated experts; with a single layer the
    head's."""
    reduces = side.patterns.rates.reduces
    return min(base for base, _ in reduces[1:-1] or reduces[-1:])


def _copied(side: Side) -> FloatArray:
    """[patterns] what replicated experts add to it."""
    return np.asarray(side.patterns.rates.reduces[0][1] * side.patterns.replicated, dtype=np.float64)


def on_ring(side: Side) -> BoolArray:
    """[patterns] whether transfers are sure to use a port of the all-reduce."""
    result = np.zeros(len(side.d), dtype=bool)
    for c, sure in side.patterns.rates.ring.items():
        if sure:
            result |= side.patterns.hosts[c]
    return result


def _reduced(layer: Layer) -> None:
    """R of the layer above follows the last dispatch but one (of a single micro-batch: the only one)."""
    side, n, d, longest = layer.side, layer.side.n, layer.side.d, layer.side.longest
    base, ring = least_reduce(side), on_ring(side)
    ways = [2 * d + max(1, n - 1) * longest, max(2, n) * d + longest, side.shared((2 * n - 1) * d)]
    through = choose(ring, base + largest(ways), NONE)
    layer.add(FIRST, REDUCED, through)
    layer.add(EARLY, REDUCED, choose(ring, d + base, NONE))
    layer.add(LAST, REDUCED, side.slowest + base)
    for c in side.attending:
        layer.add(STREAM + c, REDUCED, base)
    for e in side.hosting:
        layer.add(STREAM + e, REDUCED, choose(ring, max(1, n - 1) * side.mean[e] + d + base, NONE))
        layer.inherit(STREAM + e, LAST)
    layer.inherit(PORT, LAST)
    layer.inherit(HELD, LAST)
    layer.inherit(REDUCED, FIRST, choose(ring, 0.0, NONE))
    for event in (REDUCED, CREDIT):
        layer.add(event, REDUCED, through, base)
    if n > 1:
        layer.add(CREDIT, LAST, through + d)
        layer.add(CREDIT, EARLY, through + d + side.slowest)
        for c in side.attending:
            layer.add(CREDIT, STREAM + c, through + d + float(side.attention[c, 0]))
    for before in {before for before, _ in layer.times}:
        layer.add(before, CREDIT, layer.times.get((before, REDUCED), layer.none) + _copied(side))


def _reduced_alone(side: Side) -> Times:
    """All-reduces follow each other, and the attention of the layer above."""
    base = least_reduce(side) + 0 * side.d
    times: Times
    times = {(event, REDUCED): base for event in (REDUCED, CREDIT, FIRST, EARLY)}
    times |= {(STREAM + c, REDUCED): base for c in side.attending}
    times |= {(last, REDUCED): side.fastest + base for last in SAME}
    return times | {(event, CREDIT): way + _copied(side) for (event, _), way in times.items()}
