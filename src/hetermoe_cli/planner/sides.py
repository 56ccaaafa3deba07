"""Sides: the forward or the backward pass as chains of layers (see chains.py), every chain as seconds per pattern.

n = micro-batches of a window, d = transfer, A, E = tasks of one micro-batch. Where all of a layer is replicated there
are no transfers, and the boundary is when an attending device's own stream gets there.
"""

from functools import cached_property

import numpy as np

from hetermoe_cli.planner.arrays import BoolArray, FloatArray, anywhere, choose, largest
from hetermoe_cli.planner.patterns import Patterns


class Side:
    """One direction: lengths of its tasks, [classes, patterns] or [classes, 1], and its chains, [patterns]."""

    def __init__(self, patterns: Patterns, way: int) -> None:
        of = patterns.rates.of
        schedule = patterns.rates.choice.schedule
        self.patterns, self.n = patterns, schedule.window
        self.windows = schedule.micro_batches // schedule.window
        self.attention = np.array([[r.attention[way]] for r in of])
        self.dense = np.array([[r.dense[way]] for r in of])  # what the first stage takes longer
        hosted = np.array([[r.hosted[way]] for r in of])
        copy = np.array([[r.replicated[way]] for r in of]) * patterns.attends
        self.copies: FloatArray = patterns.replicated * copy
        self.expert: FloatArray = patterns.fullest * hosted + self.copies
        self.mean: FloatArray = patterns.mean * hosted + self.copies
        self.d = patterns.transfer
        self.both: BoolArray = patterns.hosts & patterns.attends
        self.any = anywhere(patterns.hosts)
        self.slowest = float(self.attention[patterns.attends].max())
        self.fastest = float(self.attention[patterns.attends].min())
        self.least_dense = float(self.dense[patterns.attends].min())

    def first(self, c: int) -> float:
        """One attention task of layer 0 on a device of class c."""
        return float(self.attention[c, 0] + self.dense[c, 0])

    def most(self, where: BoolArray, value: FloatArray) -> FloatArray:
        """[patterns] largest value over the classes `where`; 0 where there are none."""
        result: FloatArray = choose(where, value, 0.0).max(0)
        return result

    def or_replicated(self, ways: list[FloatArray], own: FloatArray) -> FloatArray:
        """The longest way, or the least of the attending classes' `own` where all experts are replicated."""
        least: FloatArray = choose(self.patterns.attends, own, np.inf).min(0)
        return choose(self.any, largest(ways), least)

    def shared(self, value: FloatArray) -> FloatArray:
        """`value` where dispatches and combines share links, else 0."""
        return choose(self.patterns.contended, value, 0.0)

    @cached_property
    def one(self) -> FloatArray:
        """One micro-batch through the layer: A, d, E, d."""
        return self.most(self.patterns.hosts, self.slowest + 2 * self.d + self.expert)

    @cached_property
    def contended(self) -> FloatArray:
        """Where links are shared: all d of a layer, or d, E of all or of one micro-batch, d."""
        d, n = self.d, self.n
        longest = self.most(self.patterns.hosts, self.expert)
        return self.shared(largest([2 * d + n * longest, (n + 1) * d + longest, 2 * n * d]))

    @cached_property
    def stream(self) -> FloatArray:
        """[classes, patterns] all tasks of a device of a class, on average."""
        result: FloatArray = self.n * (choose(self.patterns.attends, self.attention, 0.0) + self.mean)
        return result

    @cached_property
    def whole(self) -> FloatArray:
        """[classes, patterns] where all is replicated: the layer's tasks on one attending device."""
        return self.n * (self.attention + self.copies)

    @cached_property
    def forward_last(self) -> FloatArray:
        """From the last combine of the layer before to the last combine: A of one, E of all micro-batches."""
        own = self.most(self.both, self.attention + self.n * self.expert + self.d)
        return self.or_replicated([self.one, own], self.attention + self.n * self.copies)

    @cached_property
    def forward_lane(self) -> FloatArray:
        """The same, or through the lanes: all combines, and where links are shared all dispatches before them."""
        lanes = [self.forward_last, self.n * self.d, self.contended]
        return choose(self.any, largest(lanes), self.forward_last)

    @cached_property
    def back(self) -> FloatArray:
        """Where links are shared, from the last combine of the layer before to the first combine."""
        one = self.most(self.patterns.hosts, 2 * self.d + self.expert)
        return self.shared(largest([one, (self.n + 1) * self.d]))

    def last_end(self, heads: float) -> FloatArray:
        """The last layer's part of `forward_last`, if `heads` seconds of other heads follow on an own stream."""
        return self.forward_last + choose(self.any, 0.0, heads)

    def lane_end(self, heads: float) -> FloatArray:
        """The last layer's part of `forward_lane`: up to the last combine, or to the first one and `heads` seconds."""
        return largest([self.forward_lane, self.shared(self.back + heads), self.last_end(heads)])

    @cached_property
    def forward_first(self) -> FloatArray:
        """From the first combine of the layer before to the first combine: A of all, E of one micro-batch."""
        own = self.most(self.both, self.n * self.attention + self.expert + self.d)
        lanes = largest([self.n * self.slowest + 2 * self.d, self.slowest + (self.n + 1) * self.d])
        return self.or_replicated([self.one, own, self.shared(lanes)], self.whole)

    @cached_property
    def backward_last(self) -> FloatArray:
        """From the last dispatch of the layer after to the last dispatch."""
        return self.or_replicated([self.one, self.n * self.d, self.contended], self.attention + self.n * self.copies)

    @cached_property
    def backward_end(self) -> FloatArray:
        """The last layer's part of `backward_last`, from the start of its last combine."""
        return self.or_replicated([self.most(self.patterns.hosts, 2 * self.d + self.expert)], self.n * self.copies)

    @cached_property
    def backward_early(self) -> FloatArray:
        """From the start of the last combine to that of the layer before: E of one, A of all micro-batches."""
        own = self.most(self.both, self.d + self.expert + self.n * self.attention)
        lanes = self.shared(2 * self.d + self.n * self.slowest)
        return self.or_replicated([self.one, own, lanes], self.whole)

    @cached_property
    def backward_first(self) -> FloatArray:
        """From the start of the first combine to that of the layer before: E of all, A of one micro-batch."""
        own = self.most(self.both, self.d + self.n * self.expert + self.attention)
        lanes = self.shared((self.n + 1) * self.d + self.slowest)
        return self.or_replicated([self.one, own, lanes], self.whole)

    def turn(self, classes: tuple[int, ...]) -> FloatArray:
        """The last layer's part of `backward_first`: from the end of the heads of `classes` to the next attention."""
        met = np.isin(np.arange(len(self.attention)), classes)[:, None]
        own = self.most(self.both & met, self.n * self.expert + self.attention)
        return largest([own, self._joined])

    @cached_property
    def _joined(self) -> FloatArray:
        joined = self.most(self.both, self.d + self.expert + self.attention)
        return largest([joined, np.full_like(joined, self.fastest)])
