"""Mixed chains: they change between two lanes, layer by layer to whichever takes longer.

Which lane a chain is on depends on the layers before, so that every layer adds only the lesser of the gains from both.
A `premium` says what being on one of the two is worth at a layer's border; any value proves a bound, some are tried.
"""

from hetermoe_cli.planner.arrays import FloatArray, anywhere, choose, largest
from hetermoe_cli.planner.sides import Side


def forward_either(side: Side, premium: float, heads: float | None = None) -> FloatArray:
    """From the first or last combine of the layer before to the first or last one.

    `premium` is what being at the first one is worth; at the end of the last layer it is `heads`.
    """
    d, n, hosts = side.d, side.n, side.patterns.hosts
    worth = premium if heads is None else heads
    through = side.most(hosts, side.slowest + 2 * d + n * side.expert)
    own = side.most(side.both, n * side.attention + n * side.expert + d)
    at_first = largest([side.forward_first + worth, through, own]) - premium
    at_last = largest([side.forward_lane, side.shared(side.back + worth)])
    return choose(side.any, -largest([-at_first, -at_last]), 0.0)


def backward_either(side: Side, premium: float) -> FloatArray:
    """From the last dispatch of the layer after, or the start of the first combine, to the next of either."""
    d, n, hosts = side.d, side.n, side.patterns.hosts
    at_first = largest([side.backward_first, side.most(hosts, 2 * d + n * side.expert) - premium])
    onward = side.most(side.both, 2 * side.attention + n * side.expert)
    at_last = largest([side.backward_last, choose(anywhere(side.both), onward + premium, 0.0)])
    return choose(side.any, -largest([-at_first, -at_last]), 0.0)


def either_turn(side: Side, classes: tuple[int, ...], premium: float) -> FloatArray:
    """The last layer's part of `backward_either`, from the end of the heads of `classes`."""
    return largest([side.turn(classes) + premium, side.backward_end])


def forward_switch(side: Side, a: int, e: int, premium: float) -> FloatArray:
    """Between the streams of attending class a and of class e, which does not attend; premium: being on a's stream."""
    own, other, one = side.n * side.mean[a], side.n * side.mean[e], float(side.attention[a, 0])
    on_a = largest([side.n * one + own, choose(side.patterns.hosts[e], one + side.d + other - premium, 0.0)])
    on_e = largest([other, one + own + premium])
    return -largest([-on_a, -on_e])


def forward_switch_end(side: Side, a: int, e: int, premium: float, head: float) -> FloatArray:
    """The last layer's part of `forward_switch`, to the end of a's heads: all of them after the first combine, or one
    after the last."""
    own, other, one = side.n * side.mean[a], side.mean[e], float(side.attention[a, 0])
    heads = side.n * head
    through = largest([other + heads, side.n * other + head]) + side.d
    on_a = largest([side.n * one + own + heads, choose(side.patterns.hosts[e], one + side.d + through, 0.0)])
    on_e = largest([choose(side.patterns.hosts[e], through, 0.0), one + own + heads]) + premium
    return -largest([-on_a, -on_e])


def backward_switch(side: Side, a: int, e: int, premium: float) -> FloatArray:
    """The same from the first attention of a, or from the last expert task of e, of the layer after."""
    own, other, one = side.n * side.mean[a], side.n * side.mean[e], float(side.attention[a, 0])
    on_a = largest([side.n * one + own, choose(side.patterns.hosts[e], side.d + other - premium, 0.0)])
    on_e = largest([other, 2 * one + own + premium])
    return -largest([-on_a, -on_e])


def switch_turn(side: Side, a: int, e: int, premium: float) -> FloatArray:
    """The last layer's part of `backward_switch`, from the end of a's heads."""
    on_a = side.n * side.mean[a] + float(side.attention[a, 0]) + premium
    return largest([on_a, choose(side.patterns.hosts[e], side.d + side.expert[e], 0.0)])
