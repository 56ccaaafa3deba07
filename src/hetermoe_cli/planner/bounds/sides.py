"""Sides: the forward or the backward pass, its tasks as seconds per pattern.

n = micro-batches of a window, d = transfer, A, E = tasks of one micro-batch.
"""

from functools import cached_property

import numpy as np

from hetermoe_cli.planner.arrays import BoolArray, FloatArray, anywhere, choose
from hetermoe_cli.planner.bounds.patterns import Patterns


class Side:
    """One direction: lengths of its tasks, [classes, patterns] or [classes, 1]; what combines classes is [patterns]."""

    def __init__(self, patterns: Patterns, way: int) -> None:
        of = patterns.rates.of
        schedule = patterns.rates.choice.schedule
        self.patterns, self.way, self.n = patterns, way, schedule.window
        longer = np.array([[r.dense[way]] for r in of])  # what the first stage takes longer
        # where it takes less, as it need not run another one again, chains take all stages for as short
        self.attention = np.array([[r.attention[way]] for r in of]) + np.minimum(longer, 0)
        self.dense = np.maximum(longer, 0)
        hosted = np.array([[r.hosted[way]] for r in of])
        copy = np.array([[r.replicated[way]] for r in of]) * patterns.attends
        self.copies: FloatArray = patterns.replicated * copy
        self.expert: FloatArray = patterns.fullest * hosted + self.copies
        self.mean: FloatArray = patterns.mean * hosted + self.copies
        self.d = patterns.transfer
        self.both: BoolArray = patterns.hosts & patterns.attends
        self.any = anywhere(patterns.hosts)
        self.attending = [int(c) for c in np.flatnonzero(patterns.attends[:, 0])]
        self.hosting = [int(c) for c in np.flatnonzero(~patterns.attends[:, 0])]  # classes that do nothing else
        self.slowest = float(self.attention[self.attending].max())
        self.fastest = float(self.attention[self.attending].min())
        self.least_dense = float(self.dense[self.attending].min())

    def most(self, where: BoolArray, value: FloatArray) -> FloatArray:
        """[patterns] largest value over the classes `where`; 0 where there are none."""
        result: FloatArray = choose(where, value, 0.0).max(0)
        return result

    def shared(self, value: FloatArray) -> FloatArray:
        """`value` where dispatches and combines share links, else 0."""
        return choose(self.patterns.contended, value, 0.0)

    def least(self, value: FloatArray) -> FloatArray:
        """[patterns] smallest value over the attending classes."""
        result: FloatArray = value[self.attending].min(0)
        return result

    @cached_property
    def longest(self) -> FloatArray:
        """[patterns] E of the fullest host."""
        return self.most(self.patterns.hosts, self.expert)

    def all_host(self, c: int) -> BoolArray:
        """[patterns] whether every device of class c is sure to host."""
        patterns = self.patterns
        result: BoolArray = patterns.totals[c] > patterns.caps[c] * (patterns.rates.classes[c].count - 1)
        return result & (patterns.idle != c)

    @cached_property
    def stream(self) -> FloatArray:
        """[classes, patterns] all tasks of a device of a class, on average."""
        result: FloatArray = self.n * (choose(self.patterns.attends, self.attention, 0.0) + self.mean)
        return result

    def first(self, c: int) -> float:
        """One attention task of layer 0 on a device of class c."""
        return float(self.attention[c, 0] + self.dense[c, 0])
