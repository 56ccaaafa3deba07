"""Backward chains through all-reduces, which hold up rows where they share a port with them (last window only).

R of layer l + 1 follows the last dispatch but one of layer l (of a single micro-batch: the only one) and comes before
the first combine of layer l - 1. So between the starts of two layers' first combines lies the longer one of
`Side.backward_first`, and `through` and R. As R is of another layer, a layer counts what its own R takes beyond a
`premium`, and the lesser of what coming with and without that premium is worth: for any R
max(first, through + R) >= max(0, R - premium) + max(through, min(first, through + premium)).
A chain that meets a layer whose transfers may use other ports comes to it by R, and leaves it by the next R.
"""

from functools import cached_property

import numpy as np

from hetermoe_cli.planner.arrays import BoolArray, FloatArray, choose, largest
from hetermoe_cli.planner.sides import Side

SHARES = (0.0, 0.125, 0.35, 1.0)  # of all experts' all-reduce: premiums to try


class Reduced:
    """What the all-reduces add to the chains of the last window's backward pass (`side`), [patterns] each.

    `end`: what follows R of layer 1, without R of layer 0.
    """

    def __init__(self, side: Side) -> None:
        reduces = side.patterns.rates.reduces
        self.side = side
        self.head, self.base = reduces[-1][0], min(base for base, _ in reduces[:-1])
        self.copies: FloatArray = reduces[0][1] * side.patterns.replicated
        self.end = side.least_dense + min(side.n - 1, 1) * side.fastest
        self.premiums = [share * reduces[0][1] * side.patterns.rates.experts for share in SHARES]

    @cached_property
    def sure(self) -> BoolArray:
        """Whether transfers are sure to use a port of the all-reduce."""
        result = np.zeros(len(self.copies), dtype=bool)
        for c, sure in self.side.patterns.rates.ring.items():
            if sure:
                result |= self.side.patterns.hosts[c]
        return result

    @cached_property
    def through(self) -> FloatArray:
        """From the start of a layer's first combine to the end of the next R, without replicated experts."""
        side, n, d = self.side, self.side.n, self.side.d
        longest = side.most(side.patterns.hosts, side.expert)
        experts = 2 * d + max(1, n - 1) * longest
        lanes = max(2, n) * d + longest
        return self.base + largest([experts, lanes, side.shared((2 * n - 1) * d)])

    def every(self, premium: float) -> FloatArray:
        """A layer's part of the chain."""
        on = _within(self.through, self.side.backward_first, premium)
        return self._beyond(premium) + choose(self.sure, on, self.base - premium - self.end)

    def turn(self, classes: tuple[int, ...], premium: float) -> FloatArray:
        """The last layer's part, from the end of the heads of `classes`."""
        reduced = self.head + choose(self.sure, self.side.d, 0.0)
        return self._beyond(premium) + _within(reduced, self.side.turn(classes), premium)

    def _beyond(self, premium: float) -> FloatArray:
        return np.maximum(self.copies - premium, 0.0)


def _within(least: FloatArray, other: FloatArray, premium: float) -> FloatArray:
    """`other`, but from `least` to `least + premium`."""
    return np.minimum(np.maximum(other, least), least + premium)
