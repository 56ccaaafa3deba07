"""Borders: what happens between two layers, and how long a layer takes from each of it to each of the next.

Seconds per pattern, from the edges of the task graph; a pair that is missing has no path. For the fullest device of a
class where one device decides, for the mean of a class on its own stream (a sum over its devices). A device that hosts
nothing in a layer is on its class's stream as if it had waited for the layer's first message.

                forward, before a layer              backward, before a layer (after the attention of the one above)
FIRST           end of the first combine above       start of the layer's first combine
LAST            end of the last combine above        end of the last dispatch of the layer above
PORT            the same, where the next messages wait for it on a shared link
EARLY                                                start of the layer's last combine
REDUCED                                              end of the all-reduce of the layer two above (last window only)
CREDIT                                               the same, and the replicated experts' part of the next all-reduce
STREAM + c      class c is done with the layer above

Where all of a layer is replicated there are no messages. FIRST, LAST and EARLY are then about the stream of one
attending class; with several of them it is not known which, so that chains stay what they are.
"""

from enum import IntEnum

import numpy as np

from hetermoe_cli.planner.arrays import BoolArray, FloatArray, choose, largest
from hetermoe_cli.planner.sides import Side


class Border(IntEnum):
    """Events that are not of one class."""

    FIRST = 0
    LAST = 1
    PORT = 2
    EARLY = 3
    REDUCED = 4
    CREDIT = 5
    STREAM = 6


FIRST, LAST, PORT, EARLY, REDUCED, CREDIT, STREAM = Border
Times = dict[tuple[int, int], FloatArray]
NONE = -np.inf


class _Layer:
    """Collects the longest ways of a layer that has hosts, then those of a replicated one."""

    def __init__(self, side: Side) -> None:
        self.side, self.times = side, Times()
        self.none: FloatArray = np.full(len(side.d), NONE)

    def add(self, before: int, after: int, *ways: FloatArray | float) -> None:
        """Ways from one event to the other."""
        known = self.times.get((before, after), self.none)
        self.times[before, after] = largest([known, *(way + 0.0 * self.side.d for way in ways)])

    def inherit(self, earlier: int, later: int, apart: FloatArray | float = 0.0) -> None:
        """What happens `earlier` comes before what happens `later`, by `apart` at least."""
        for (before, after), way in list(self.times.items()):
            if before == later:
                self.add(earlier, after, way + apart)

    def replicated(self, before: int, after: int, way: FloatArray | float) -> None:
        """Where all of the layer is replicated."""
        known = self.times.get((before, after), self.none)
        self.times[before, after] = choose(self.side.any, known, way + 0.0 * self.side.d)

    def finish(self, replicated: Times) -> Times:
        """Other ways than these do not exist in a replicated layer."""
        for pair in {*self.times, *replicated}:
            self.replicated(*pair, replicated.get(pair, self.none))
        return self.times


def forward_times(side: Side) -> Times:
    """From border to border in the forward pass."""
    layer, n, d, slowest, longest = _Layer(side), side.n, side.d, side.slowest, side.longest
    both, one = side.both, side.slowest + 2 * side.d + side.longest
    own = side.most(both, n * side.attention + side.expert + d)
    last = largest([one, side.most(both, side.attention + n * side.expert + d)])
    layer.add(FIRST, FIRST, one, own, side.shared(largest([n * slowest + 2 * d, slowest + (n + 1) * d])))
    through = (slowest + 2 * d + n * longest, slowest + (n + 1) * d + longest, n * slowest + 2 * d + longest)
    layer.add(FIRST, LAST, *through, side.most(both, n * (side.attention + side.expert) + d))
    layer.add(FIRST, LAST, side.shared(slowest + 2 * n * d))
    layer.add(LAST, FIRST, d)
    layer.add(LAST, LAST, last, n * d)
    layer.add(PORT, FIRST, side.shared(largest([2 * d + longest, (n + 1) * d])))
    layer.add(PORT, LAST, side.shared(largest([2 * d + n * longest, (n + 1) * d + longest, 2 * n * d])))
    for e in side.hosting:
        stream, mean = STREAM + e, side.mean[e]
        layer.add(FIRST, stream, slowest + d + n * mean, n * slowest + d + mean)
        layer.add(LAST, stream, slowest + d + mean)
        layer.add(PORT, stream, side.shared(d + n * mean))
        layer.add(stream, FIRST, mean + d)
        layer.add(stream, LAST, n * mean + d, mean + n * d)
        layer.add(stream, stream, n * mean)
    for c in side.attending:
        _forward_stream(layer, c)
    layer.inherit(PORT, LAST)
    for earlier in (FIRST, *(STREAM + e for e in side.hosting)):
        layer.inherit(earlier, PORT)
    return _alias(layer.finish(_replicated_forward(side)))


def _forward_stream(layer: _Layer, c: int) -> None:
    side, stream = layer.side, STREAM + c
    n, d, longest, mean, own = side.n, side.d, side.longest, side.mean[c], float(side.attention[c, 0])
    sure = side.all_host(c)
    layer.add(FIRST, stream, n * (own + mean))
    layer.add(LAST, stream, own + n * mean)
    layer.add(stream, stream, n * (own + mean))
    layer.add(stream, FIRST, own + 2 * d + longest, choose(sure, n * own + mean + d, NONE))
    layer.add(stream, FIRST, side.shared(largest([own + (n + 1) * d, n * own + 2 * d])))
    layer.add(stream, LAST, own + 2 * d + n * longest, own + (n + 1) * d + longest, n * own + 2 * d + longest)
    layer.add(stream, LAST, choose(sure, n * (own + mean) + d, NONE), side.shared(own + 2 * n * d))
    for e in side.hosting:
        layer.add(stream, STREAM + e, own + d + n * side.mean[e], n * own + d + side.mean[e])


def _replicated_forward(side: Side) -> Times:
    n, times = side.n, Times()
    whole, end = side.least(n * (side.attention + side.copies)), side.least(side.attention + n * side.copies)
    times[FIRST, FIRST] = whole
    for last in (LAST, PORT):
        times[last, LAST] = end
    for c in side.attending:
        times[STREAM + c, STREAM + c] = n * (side.attention[c] + side.copies[c])
    for e in side.hosting:
        times[STREAM + e, STREAM + e] = 0 * whole
        times[STREAM + e, LAST] = end
    if len(side.attending) == 1:
        stream = STREAM + side.attending[0]
        times |= {(before, after): whole for before in (FIRST, stream) for after in (FIRST, LAST, stream)}
        times |= {(last, after): end for last in (LAST, PORT) for after in (FIRST, LAST, stream)}
        times |= {(STREAM + e, after): end for e in side.hosting for after in (FIRST, LAST, stream)}
    return times


def _alias(times: Times) -> Times:
    """LAST and PORT are one moment."""
    return times | {(before, PORT): way for (before, after), way in times.items() if after == LAST}


def backward_times(side: Side) -> Times:
    """From border to border in the backward pass."""
    layer, n, d, slowest, longest = _Layer(side), side.n, side.d, side.slowest, side.longest
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
    return _alias(layer.finish(_replicated_backward(side)))


def _backward_stream(layer: _Layer, c: int) -> None:
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


def _close_backward(layer: _Layer) -> None:
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


def _replicated_backward(side: Side) -> Times:
    n, times = side.n, Times()
    whole = side.least(n * (side.attention + side.copies))
    early, end = side.least(n * side.copies + side.attention), side.least(side.attention + n * side.copies)
    times |= {(FIRST, FIRST): whole, (EARLY, EARLY): whole, (EARLY, FIRST): early}
    times |= {(last, LAST): end for last in (LAST, PORT)}
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
        times |= {(last, after): way + own for last in (LAST, PORT)}
        times |= {(STREAM + e, after): way + own for e in side.hosting}
    return times


def least_reduce(side: Side) -> float:
    """Least seconds of the all-reduce of a layer above layer 0 without replicated experts; with a single layer the
    head's."""
    reduces = side.patterns.rates.reduces
    return min(base for base, _ in reduces[1:-1] or reduces[-1:])


def _copied(side: Side) -> FloatArray:
    """[patterns] what replicated experts add to it."""
    result: FloatArray = side.patterns.rates.reduces[0][1] * side.patterns.replicated
    return result


def on_ring(side: Side) -> BoolArray:
    """[patterns] whether transfers are sure to use a port of the all-reduce."""
    result = np.zeros(len(side.d), dtype=bool)
    for c, sure in side.patterns.rates.ring.items():
        if sure:
            result |= side.patterns.hosts[c]
    return result


def _reduced(layer: _Layer) -> None:
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
    layer.inherit(REDUCED, FIRST, choose(ring, 0.0, NONE))
    for before in (REDUCED, CREDIT):
        layer.add(before, REDUCED, through, base)
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
    times |= {(last, REDUCED): side.fastest + base for last in (LAST, PORT)}
    return times | {(event, CREDIT): way + _copied(side) for (event, _), way in times.items()}
