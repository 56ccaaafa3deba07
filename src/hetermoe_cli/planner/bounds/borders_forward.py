"""The forward pass: how long a layer takes from border to border (borders.py)."""

from hetermoe_cli.planner.arrays import choose, largest
from hetermoe_cli.planner.bounds.borders import FIRST, HELD, LAST, NONE, PORT, SAME, STREAM, Layer, Times, alias
from hetermoe_cli.planner.bounds.sides import Side


def forward_times(side: Side) -> Times:
    """From border to border in the forward pass."""
    layer, n, d, slowest, longest = Layer(side), side.n, side.d, side.slowest, side.longest
    both, one = side.both, side.slowest + 2 * side.d + side.longest
    own = side.most(both, n * side.attention + side.expert + d)
    last = largest([one, side.most(both, side.attention + n * side.expert + d)])
    layer.add(FIRST, FIRST, one, own, side.shared(largest([n * slowest + 2 * d, slowest + (n + 1) * d])))
    through = (slowest + 2 * d + n * longest, slowest + (n + 1) * d + longest, n * slowest + 2 * d + longest)
    layer.add(FIRST, LAST, *through, side.most(both, n * (side.attention + side.expert) + d))
    layer.add(FIRST, LAST, side.shared(slowest + 2 * n * d))
    layer.add(LAST, LAST, last)
    layer.add(PORT, FIRST, d, side.shared(largest([2 * d + longest, (n + 1) * d])))
    layer.add(PORT, LAST, n * d, side.shared(largest([2 * d + n * longest, (n + 1) * d + longest, 2 * n * d])))
    held = side.patterns.held
    layer.add(HELD, FIRST, choose(held, 2 * d + longest, NONE))
    layer.add(HELD, LAST, choose(held, largest([2 * d + n * longest, (n + 1) * d + longest]), NONE))
    for e in side.hosting:
        stream, mean = STREAM + e, side.mean[e]
        layer.add(FIRST, stream, slowest + d + n * mean, n * slowest + d + mean)
        layer.add(LAST, stream, slowest + d + mean)
        layer.add(PORT, stream, side.shared(d + n * mean))
        layer.add(HELD, stream, choose(held, d + n * mean, NONE))
        layer.add(stream, FIRST, mean + d)
        layer.add(stream, LAST, n * mean + d, mean + n * d)
        layer.add(stream, stream, n * mean)
    for c in side.attending:
        _forward_stream(layer, c)
    layer.inherit(PORT, LAST)
    layer.inherit(HELD, LAST)
    for earlier in (FIRST, *(STREAM + e for e in side.hosting)):
        layer.inherit(earlier, PORT)
    return alias(side, layer.finish(_replicated_forward(side)))


def _forward_stream(layer: Layer, c: int) -> None:
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
    for last in SAME:
        times[last, LAST] = end
    for c in side.attending:
        times[STREAM + c, STREAM + c] = n * (side.attention[c] + side.copies[c])
    for e in side.hosting:
        times[STREAM + e, STREAM + e] = 0 * whole
        times[STREAM + e, LAST] = end
    if len(side.attending) == 1:
        stream = STREAM + side.attending[0]
        times |= {(before, after): whole for before in (FIRST, stream) for after in (FIRST, LAST, stream)}
        times |= {(last, after): end for last in SAME for after in (FIRST, LAST, stream)}
        times |= {(STREAM + e, after): end for e in side.hosting for after in (FIRST, LAST, stream)}
    return times
