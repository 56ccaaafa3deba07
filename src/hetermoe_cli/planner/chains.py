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
from functools import cached_property, partial
from itertools import product

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
    def back(self) -> FloatArray:
        """Where links are shared, from the last combine of the layer before to the first combine."""
        one = self.most(self.patterns.hosts, 2 * self.d + self.expert)
        return self.patterns.contended * np.maximum(one, (self.n + 1) * self.d)

    def forward_end(self, heads: float) -> FloatArray:
        """The last layer's part of `forward_last` up to the first head, where `heads` are those of the other micro-batches.

        Or up to the last combine, without them.
        """
        all_heads = np.where(self.patterns.contended, self.back + heads, 0.0)
        own = self.attention + self.n * self.copies + heads
        return self.or_replicated([self.forward_last, all_heads], own)

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

    def forward_either(self, premium: float, heads: float | None = None) -> FloatArray:
        """From the first or last combine of the layer before to the first or last one, whichever takes longer.

        `premium` is what being at the first one is worth; every layer adds at least the lesser gain of the two.
        In the last layer it is worth `heads`.
        """
        d, n, hosts = self.d, self.n, self.patterns.hosts
        worth = premium if heads is None else heads
        across = np.maximum(
            self.most(hosts, self.slowest + 2 * d + n * self.expert),
            self.most(self.both, n * self.attention + n * self.expert + d),
        )
        at_first = np.maximum(self.forward_first + worth, across) - premium
        at_last = np.maximum(self.forward_last, np.where(self.patterns.contended, self.back + worth, 0.0))
        return np.where(hosts.any(0), np.minimum(at_first, at_last), 0.0)

    def backward_either(self, premium: float) -> FloatArray:
        """From the last dispatch of the layer after, or the start of the first combine, to the next of either."""
        d, n, hosts = self.d, self.n, self.patterns.hosts
        at_first = np.maximum(self.backward_first, self.most(hosts, 2 * d + n * self.expert) - premium)
        onward = self.most(self.both, 2 * self.attention + n * self.expert)
        at_last = np.maximum(self.backward_last, np.where(self.both.any(0), onward + premium, 0.0))
        return np.where(hosts.any(0), np.minimum(at_first, at_last), 0.0)

    def either_turn(self, classes: tuple[int, ...], premium: float) -> FloatArray:
        """The last layer's part of `backward_either`, from the end of the heads of `classes`."""
        return np.maximum(self.turn(classes) + premium, self.backward_end)

    def forward_switch(self, a: int, e: int, premium: float) -> FloatArray:
        """Between the stream of attending class a and that of e, whichever layer by layer takes longer.

        `premium` is what being on a's stream is worth; every layer adds at least the lesser of the gains from both.
        """
        own, other = self.n * self.expert_of(a), self.n * self.expert_of(e)
        one = float(self.attention[a, 0])
        on_a = np.maximum(self.n * one + own, (one + self.d + other - premium) * self.patterns.hosts[e])
        on_e = np.maximum(other, one + own + premium)
        return np.minimum(on_a, on_e)

    def backward_switch(self, a: int, e: int, premium: float) -> FloatArray:
        """The same from the first attention of a, or from the last expert task of e, of the layer after."""
        own, other = self.n * self.expert_of(a), self.n * self.expert_of(e)
        one = float(self.attention[a, 0])
        on_a = np.maximum(self.n * one + own, (self.d + other - premium) * self.patterns.hosts[e])
        on_e = np.maximum(other, 2 * one + own + premium)
        return np.minimum(on_a, on_e)

    def switch_turn(self, a: int, e: int, premium: float) -> FloatArray:
        """The last layer's part of `backward_switch`, from the end of a's heads."""
        on_a = self.n * self.expert_of(a) + float(self.attention[a, 0]) + premium
        return np.maximum(on_a, (self.d + self.expert[e]) * self.patterns.hosts[e])

    def expert_of(self, c: int) -> FloatArray:
        """Mean expert task of a class."""
        return self.mean[c]


SHARES = (0.0, 0.5, 1.0)  # premiums to try, from one extreme to the other


def zebra_rows(patterns: Patterns) -> list[Row]:
    """All pairs of a forward and a backward chain that meet at the heads."""
    forward, backward = Side(patterns, 0), Side(patterns, 1)
    head = {c: r.head for c, r in enumerate(patterns.rates.of) if patterns.rates.classes[c].attends}
    n = forward.n
    others, start = (n - 1) * min(head.values()), (n - 1) * forward.fastest
    all_heads = {c: n * seconds for c, seconds in head.items()}
    last, first = lambda: forward.forward_last, lambda: forward.forward_first
    rows = list(_meet(backward, last, partial(forward.forward_end, others), start, head))
    rows += _meet(backward, first, first, 0.0, all_heads)
    for premium in (share * start for share in SHARES):
        end = partial(forward.forward_either, premium, others)
        rows += _meet(backward, partial(forward.forward_either, premium), end, start, head)
    for c, seconds in head.items():
        stream = _stream(forward, c)
        rows += _meet(backward, stream, stream, 0.0, {c: n * seconds})
        for e, share in product(_experts(patterns), SHARES):
            premium = float(forward.attention[c, 0]) * (1 + share * (n - 2))
            switch = partial(forward.forward_switch, c, e, premium)
            rows += _meet(backward, switch, switch, 0.0, {c: min(n * seconds, premium + seconds)})
    return rows + list(_expert_streams(forward, backward, head))


def _experts(patterns: Patterns) -> list[int]:
    """Classes that do not attend."""
    return [int(c) for c in np.flatnonzero(~patterns.attends[:, 0])]


def _stream(side: Side, c: int) -> Part:
    return lambda: side.stream[c]


def _meet(side: Side, ahead: Part, ahead_end: Part, start: float, heads: dict[int, float]) -> Iterator[Row]:
    """Join one forward chain (`ahead_end`: in the last layer) to every backward chain.

    `heads` [class]: from the forward chain's end to the end of the class's heads.
    """
    latest, least, classes = max(heads.values()), min(heads.values()), tuple(heads)
    rest = (side.n - 1) * side.fastest
    last, early = (ahead, lambda: side.backward_last), (ahead, lambda: side.backward_early)
    yield Row("last", last, (ahead_end, lambda: side.backward_end), start + latest + side.slowest)
    yield Row("early", early, (ahead_end, lambda: side.backward_early), start + latest)
    first = (ahead, lambda: side.backward_first)
    yield Row("first", first, (ahead_end, lambda: side.turn(classes)), start + least + rest)
    for premium in (share * rest for share in SHARES):
        either = (ahead, partial(side.backward_either, premium))
        turn = (ahead_end, partial(side.either_turn, classes, premium))
        yield Row("either", either, turn, start + least + min(rest - premium, side.slowest))
    for c, until in heads.items():
        stream = _stream(side, c)
        yield Row(f"stream {c}", (ahead, stream), (ahead_end, stream), start + until)
        yield from _switches(side, c, ahead, ahead_end, start + until)


def _switches(side: Side, c: int, ahead: Part, ahead_end: Part, start: float) -> Iterator[Row]:
    one = float(side.attention[c, 0])
    for e, share in product(_experts(side.patterns), SHARES):
        premium = max(0.0, share * (side.n - 2) * one)
        every = (ahead, partial(side.backward_switch, c, e, premium))
        turn = (ahead_end, partial(side.switch_turn, c, e, premium))
        yield Row("switch", every, turn, start + min((side.n - 1) * one - premium, one))


def _expert_streams(forward: Side, backward: Side, head: dict[int, float]) -> Iterator[Row]:
    """Backward streams of classes that do not attend: after their own forward stream, or after the first head."""
    for c in _experts(forward.patterns):
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
    rows = [Row("sequential", every, every, n * (float(head[attends[:, 0]].min()) - apart))]
    for c in range(len(head)):
        stream = (_stream(forward, c), _stream(backward, c))
        rows.append(Row(f"stream {c}", stream, stream, float(n * head[c])))
    return rows


def _alone(side: Side) -> FloatArray:
    """One micro-batch through a layer, with nothing overlapped."""
    own = np.where(side.patterns.attends, side.attention + side.copies, 0.0).max(0)
    return side.or_replicated([side.one, own], side.attention + side.copies)
