"""Chains: paths through the task graph whose length is a sum over layers, whatever the order of patterns.

A forward chain reaches the end of the last head, a backward chain starts there; together they bound the iteration
from below. Between layers a chain passes one boundary event, and in each layer it takes the longest way to the next.

forward                                           backward
last   end of the last combine of a layer         last   end of the last dispatch (of gradients) of a layer
first  end of the first combine                   first  start of the first combine
stream tasks of one class                         early  start of the last combine, then all attention
                                                  stream tasks of one class
R = micro-batches, d = transfer, A, E = tasks of one micro-batch. Where all of a layer is replicated there are no
transfers, and the boundary is when an attending device's own stream gets there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.planner.counts import FloatArray
from hetermoe_cli.planner.patterns import Patterns


Part = Callable[[], FloatArray]


@dataclass(frozen=True)
class Row:
    """Iteration >= constant + the sum of `every` over all layers but the last, and of `last` (parts are [patterns]).

    Without the all-reduce and the optimizer step. Parts are computed when they are asked for.
    """

    name: str
    every: tuple[Part, ...]
    last: tuple[Part, ...]
    constant: float


class Side:
    """One direction: lengths of its tasks, [classes, patterns] or [classes, 1], and its chains, [patterns]."""

    def __init__(self, patterns: Patterns, way: int) -> None:
        of = patterns.rates.of
        self.patterns, self.n = patterns, patterns.rates.choice.schedule.micro_batches
        self.attention = np.array([[r.attention[way]] for r in of])
        hosted = np.array([[r.hosted[way]] for r in of])
        copy = np.array([[r.replicated[way]] for r in of]) * patterns.attends
        self.copies = patterns.replicated * copy
        self.expert = patterns.fullest * hosted + self.copies
        self.mean = patterns.mean * hosted + self.copies
        self.d = patterns.transfer
        self.both = patterns.hosts & patterns.attends
        self.slowest = float(self.attention[patterns.attends].max())
        self.fastest = float(self.attention[patterns.attends].min())

    def most(self, where: NDArray[np.bool_], value: FloatArray) -> FloatArray:
        """[patterns] largest value over the classes `where`; 0 where there are none."""
        result: FloatArray = np.where(where, value, 0.0).max(0)
        return result

    def or_replicated(self, ways: list[FloatArray], own: FloatArray) -> FloatArray:
        """The longest way, or the least of the attending classes' `own` where all experts are replicated."""
        least = np.where(self.patterns.attends, own, np.inf).min(0)
        result: FloatArray = np.where(self.patterns.hosts.any(0), np.maximum.reduce(ways), least)
        return result

    @cached_property
    def one(self) -> FloatArray:
        """One micro-batch through the layer: A, d, E, d."""
        return self.most(self.patterns.hosts, self.slowest + 2 * self.d + self.expert)

    @cached_property
    def contended(self) -> FloatArray:
        """Where dispatches and combines share links: all d of a layer, or d, E of all or of one micro-batch, d."""
        d, n = self.d, self.n
        longest = self.most(self.patterns.hosts, self.expert)
        return self.patterns.contended * np.maximum.reduce([2 * d + n * longest, (n + 1) * d + longest, 2 * n * d])

    @cached_property
    def stream(self) -> FloatArray:
        """[classes, patterns] all tasks of a device of a class, on average."""
        return self.n * (np.where(self.patterns.attends, self.attention, 0.0) + self.mean)

    @cached_property
    def whole(self) -> FloatArray:
        """Where all is replicated: the layer's tasks on one attending device."""
        return self.n * (self.attention + self.copies)

    @cached_property
    def forward_last(self) -> FloatArray:
        """From the last combine of the layer before to the last combine: A of one, E of all micro-batches."""
        own = self.most(self.both, self.attention + self.n * self.expert + self.d)
        return self.or_replicated([self.one, own, self.contended], self.attention + self.n * self.copies)

    @cached_property
    def forward_first(self) -> FloatArray:
        """From the first combine of the layer before to the first combine: A of all, E of one micro-batch."""
        own = self.most(self.both, self.n * self.attention + self.expert + self.d)
        shared = np.maximum(self.n * self.slowest + 2 * self.d, self.slowest + (self.n + 1) * self.d)
        return self.or_replicated([self.one, own, self.patterns.contended * shared], self.whole)

    @cached_property
    def backward_last(self) -> FloatArray:
        """From the last dispatch of the layer after to the last dispatch."""
        return self.or_replicated([self.one, self.contended], self.attention + self.n * self.copies)

    @cached_property
    def backward_end(self) -> FloatArray:
        """The last layer's part of `backward_last`, from the start of its last combine."""
        return self.or_replicated([self.most(self.patterns.hosts, 2 * self.d + self.expert)], self.n * self.copies)

    @cached_property
    def backward_early(self) -> FloatArray:
        """From the start of the last combine to that of the layer before: E of one, A of all micro-batches."""
        own = self.most(self.both, self.d + self.expert + self.n * self.attention)
        shared = self.patterns.contended * (2 * self.d + self.n * self.slowest)
        return self.or_replicated([self.one, own, shared], self.whole)

    @cached_property
    def backward_first(self) -> FloatArray:
        """From the start of the first combine to that of the layer before: E of all, A of one micro-batch."""
        own = self.most(self.both, self.d + self.n * self.expert + self.attention)
        shared = self.patterns.contended * ((self.n + 1) * self.d + self.slowest)
        return self.or_replicated([self.one, own, shared], self.whole)

    def turn(self, classes: tuple[int, ...]) -> FloatArray:
        """The last layer's part of `backward_first`: from the end of the heads of `classes` to the next attention."""
        met = np.isin(np.arange(len(self.attention)), classes)[:, None]
        own = self.most(self.both & met, self.n * self.expert + self.attention)
        return np.maximum(own, self._joined)

    @cached_property
    def _joined(self) -> FloatArray:
        joined = self.most(self.both, self.d + self.expert + self.attention)
        return np.maximum(joined, self.fastest)


def zebra_rows(patterns: Patterns) -> list[Row]:
    """All pairs of a forward and a backward chain that meet at the heads."""
    forward, backward = Side(patterns, 0), Side(patterns, 1)
    head = {c: r.head for c, r in enumerate(patterns.rates.of) if patterns.rates.classes[c].attends}
    n = forward.n
    rows = list(_meet(backward, lambda: forward.forward_last, (n - 1) * forward.fastest, head))
    rows += _meet(backward, lambda: forward.forward_first, 0.0, {c: n * seconds for c, seconds in head.items()})
    for c, seconds in head.items():
        rows += _meet(backward, _stream(forward, c), 0.0, {c: n * seconds})
    return rows + list(_expert_streams(forward, backward, head))


def _stream(side: Side, c: int) -> Part:
    return lambda: side.stream[c]


def _meet(side: Side, ahead: Part, start: float, heads: dict[int, float]) -> Iterator[Row]:
    """Join one forward chain to every backward chain; `heads` [class]: from its end to the end of the class's heads."""
    latest, least, classes = max(heads.values()), min(heads.values()), tuple(heads)
    last, early = (ahead, lambda: side.backward_last), (ahead, lambda: side.backward_early)
    yield Row("last", last, (ahead, lambda: side.backward_end), start + latest + side.slowest)
    yield Row("early", early, early, start + latest)
    end = start + least + (side.n - 1) * side.fastest
    yield Row("first", (ahead, lambda: side.backward_first), (ahead, lambda: side.turn(classes)), end)
    for c, until in heads.items():
        both = (ahead, _stream(side, c))
        yield Row(f"stream {c}", both, both, start + until)


def _expert_streams(forward: Side, backward: Side, head: dict[int, float]) -> Iterator[Row]:
    """Backward streams of classes that do not attend: after their own forward stream, or after the first head."""
    for c in np.flatnonzero(~forward.patterns.attends[:, 0]):
        behind = _stream(backward, c)
        both = (_stream(forward, c), behind)
        yield Row(f"stream {c}", both, both, forward.slowest + backward.slowest)
        turn = (lambda: forward.forward_first, behind)
        yield Row(f"turn {c}", turn, turn, max(head.values()) + backward.slowest)
        for a, seconds in head.items():
            turn = (_stream(forward, a), behind)
            yield Row(f"turn {a} {c}", turn, turn, seconds + backward.slowest)


def sequential_rows(patterns: Patterns) -> list[Row]:
    """One micro-batch after another, each through all layers; and every device's own tasks."""
    forward, backward = Side(patterns, 0), Side(patterns, 1)
    n, head = forward.n, np.array([r.head for r in patterns.rates.of])
    attends = patterns.attends
    both = float((forward.attention + backward.attention)[attends].max())
    apart = forward.slowest + backward.slowest - both  # the same device goes on with the next micro-batch
    every = (lambda: n * _alone(forward), lambda: n * _alone(backward))
    rows = [Row("sequential", every, every, n * (float(head[attends[:, 0]].max()) - apart))]
    for c in range(len(head)):
        stream = (_stream(forward, c), _stream(backward, c))
        rows.append(Row(f"stream {c}", stream, stream, float(n * head[c])))
    return rows


def _alone(side: Side) -> FloatArray:
    """One micro-batch through a layer, with nothing overlapped."""
    own = np.where(side.patterns.attends, side.attention + side.copies, 0.0).max(0)
    return np.maximum(side.one, own)
