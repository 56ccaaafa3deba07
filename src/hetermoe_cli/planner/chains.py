"""Chains: paths through the task graph whose length is a sum over layers, whatever the order of patterns.

A forward chain reaches the end of the last head, a backward chain starts there; together they bound the iteration
from below. Between layers a chain passes one boundary event, and in each layer it takes the longest way to the next.

forward                                           backward
last   end of the last combine of a layer         last   end of the last dispatch (of gradients) of a layer
first  end of the first combine                   first  start of the first combine
stream tasks of one class                         early  start of the last combine, then all attention
                                                  stream tasks of one class
                                                  either, switch: changing between two of these (mixed.py)

Every chain begins and ends with at least one attention task of layer 0 on some attending class, those of all
micro-batches where its constant counts the attention of the others. What dense layers add there is in the constants.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np

from hetermoe_cli.planner.arrays import FloatArray, choose
from hetermoe_cli.planner.mixed import (
    backward_either,
    backward_switch,
    either_turn,
    forward_either,
    forward_switch,
    forward_switch_end,
    switch_turn,
)
from hetermoe_cli.planner.patterns import Patterns
from hetermoe_cli.planner.reduced import Reduced
from hetermoe_cli.planner.sides import Side

Part = Callable[[], FloatArray]


@dataclass(frozen=True)
class Row:
    """Iteration >= constant + the sum of `every` over all layers but the last, and of `last` (parts are [patterns]).

    Without the all-reduce and the optimizer step. Parts are computed when they are asked for. `begins`, `ends`: the
    class whose own stream the chain starts or ends on; None: it starts with the first dispatch, which all attending
    classes must have made ready, and ends with some class's last attention. `last_only`: it holds in the last window.
    """

    name: str
    every: tuple[Part, ...]
    last: tuple[Part, ...]
    constant: float
    begins: int | None = None
    ends: int | None = None
    last_only: bool = False

    def repeated(self, windows: int) -> "Row":
        """The same chain through `windows` windows."""

        def times(part: Part) -> Part:
            return lambda: windows * part()

        every, last = tuple(map(times, self.every)), tuple(map(times, self.last))
        return replace(self, every=every, last=last, constant=windows * self.constant)


SHARES = (0.0, 0.5, 1.0)  # premiums to try, from one extreme to the other


class Chains(NamedTuple):
    """Chains through all windows, through one of the windows before the last one, and through the last one.

    The iteration is bounded by one of all windows, and by one of each of the others together.
    """

    whole: list[Row]
    earlier: list[Row]
    last: list[Row]


def chains_of(forward: Side, backward: Side, mixed: bool) -> Chains:
    """Windows follow one another: on an attending class they never overlap.

    With several attending classes, a chain must begin on the class that the one before ends with, or wait for all; what
    ends one window may then start the next up to the difference of their attention earlier.
    """
    rows, windows = _window_rows(forward, backward, mixed), forward.windows
    if windows == 1:
        return Chains(rows, [], [])
    whole: list[Row] = []
    if sum(c.attends for c in forward.patterns.rates.classes) > 1:
        own = [row for row in rows if row.begins is not None and row.begins == row.ends]
        whole = [row.repeated(windows) for row in own if not row.last_only]
        rows = [row for row in rows if row.begins is None]
    apart = forward.slowest - forward.fastest
    before = [replace(row, constant=row.constant - apart * (row.begins is None)) for row in rows if not row.last_only]
    return Chains(whole, before, rows)


def _window_rows(forward: Side, backward: Side, mixed: bool) -> list[Row]:
    """All pairs of a forward and a backward chain that meet at the heads; `mixed`: also those that change lanes."""
    rates = forward.patterns.rates
    head = {c: r.head for c, r in enumerate(rates.of) if rates.classes[c].attends}
    n = forward.n
    others, start, dense = (n - 1) * min(head.values()), (n - 1) * forward.fastest, forward.least_dense
    rows: list[Row] = []
    for every, end, begin in (
        (_of(forward, "forward_last"), partial(forward.last_end, others), start + n * dense),
        (
            _of(forward, "forward_lane"),
            partial(forward.lane_end, others),
            min(start + n * dense, forward.slowest + dense),
        ),
    ):
        rows += _meet(backward, mixed, every, end, begin, head)
    first = _of(forward, "forward_first")
    rows += _meet(backward, mixed, first, first, dense, {c: n * seconds for c, seconds in head.items()})
    for c, seconds in head.items():
        stream, begin = _stream(forward, c), n * float(forward.dense[c, 0])
        rows += _begin(c, _meet(backward, mixed, stream, stream, begin, {c: n * seconds}))
    if mixed:
        rows += _forward_mixed(forward, backward, head)
    return rows + list(_expert_streams(forward, backward, head))


def _forward_mixed(forward: Side, backward: Side, head: dict[int, float]) -> Iterator[Row]:
    n = forward.n
    others = (n - 1) * min(head.values())
    for premium in (share * (n - 1) * forward.fastest for share in SHARES):
        end = partial(forward_either, forward, premium, others)
        begin = premium + forward.least_dense
        yield from _meet(backward, True, partial(forward_either, forward, premium), end, begin, head)
    for c, e, share in product(head, _experts(forward.patterns), SHARES):
        premium = float(forward.attention[c, 0]) * (1 + share * (n - 2))
        switch = partial(forward_switch, forward, c, e, premium)
        end = partial(forward_switch_end, forward, c, e, premium, head[c])
        yield from _begin(c, _meet(backward, True, switch, end, forward.least_dense, {c: 0.0}))


def _begin(c: int, rows: Iterator[Row]) -> Iterator[Row]:
    return (replace(row, begins=c) for row in rows)


def _experts(patterns: Patterns) -> list[int]:
    """Classes that do not attend."""
    return [int(c) for c in np.flatnonzero(~patterns.attends[:, 0])]


def _of(side: Side, chain: str) -> Part:
    """One of the side's chains, computed when it is asked for."""
    return lambda: getattr(side, chain)


def _stream(side: Side, c: int) -> Part:
    return lambda: side.stream[c]


def _where(side: Side, hosts: float, replicated: float) -> FloatArray:
    """[patterns] `hosts` seconds, or `replicated` where no class hosts."""
    return choose(side.any, hosts, replicated)


def _meet(
    side: Side, mixed: bool, ahead: Part, ahead_end: Part, start: float, heads: dict[int, float]
) -> Iterator[Row]:
    """Join one forward chain (`ahead_end`: in the last layer) to every backward chain.

    `heads` [class]: from the forward chain's end to the end of the class's heads. The classes meet at the last layer's
    combine. Where that is replicated they do not: then the shortest heads count, and a chain that came on one class's
    stream goes on with that class's attention.
    """
    longest, least, classes = max(heads.values()), min(heads.values()), tuple(heads)
    rest, dense = (side.n - 1) * side.fastest, side.least_dense
    behind = side.slowest - float(side.attention[classes[0], 0]) if len(classes) == 1 else 0.0
    meeting: Part = partial(_where, side, longest - least, 0.0)
    staying: Part = partial(_where, side, 0.0, -behind)
    last, early, first = (_of(side, f"backward_{name}") for name in ("last", "early", "first"))
    end = (ahead_end, _of(side, "backward_end"), meeting, staying)
    yield Row("last", (ahead, last), end, start + least + side.slowest + dense)
    yield Row("early", (ahead, early), (ahead_end, early, meeting), start + least + dense)
    turning = (ahead_end, partial(side.turn, classes))
    yield Row("first", (ahead, first), turning, start + least + rest + side.n * dense)
    if side.patterns.rates.ring:
        yield from _reduced(Reduced(side), mixed, ahead, ahead_end, start + least, classes)
    for premium in (share * rest for share in SHARES if mixed):
        either = (ahead, partial(backward_either, side, premium))
        turn = (ahead_end, partial(either_turn, side, classes, premium), staying)
        yield Row("either", either, turn, start + least + min(rest - premium, side.slowest) + dense)
    for c, until in heads.items():
        stream = _stream(side, c)
        own = side.n * float(side.dense[c, 0])
        yield Row(f"stream {c}", (ahead, stream), (ahead_end, stream), start + until + own, ends=c)
        if mixed:
            yield from _switches(side, c, ahead, ahead_end, start + until + dense)


def _reduced(
    reduced: Reduced, mixed: bool, ahead: Part, ahead_end: Part, start: float, classes: tuple[int, ...]
) -> Iterator[Row]:
    """Through the all-reduces, with several premiums if `mixed`."""
    for premium in reduced.premiums if mixed else reduced.premiums[::3]:
        every = (ahead, partial(reduced.every, premium))
        turn = (ahead_end, partial(reduced.turn, classes, premium))
        yield Row("reduced", every, turn, start + reduced.end, last_only=True)


def _switches(side: Side, c: int, ahead: Part, ahead_end: Part, start: float) -> Iterator[Row]:
    one = float(side.attention[c, 0])
    for e, share in product(_experts(side.patterns), SHARES):
        premium = max(0.0, share * (side.n - 2) * one)
        every = (ahead, partial(backward_switch, side, c, e, premium))
        turn = (ahead_end, partial(switch_turn, side, c, e, premium))
        yield Row("switch", every, turn, start + min((side.n - 1) * one - premium, one), ends=c)


def _expert_streams(forward: Side, backward: Side, head: dict[int, float]) -> Iterator[Row]:
    """Backward streams of classes that do not attend: after their own forward stream, or after the first head.

    The longest head and the slowest attention count only where a last layer with hosts makes the classes meet.
    """
    own = {a: float(backward.attention[a, 0]) for a in head}
    both = max(forward.first(a) + backward.first(a) for a in head)
    longest, least = max(head.values()) + backward.slowest, min(head[a] + own[a] for a in head)
    dense = backward.least_dense
    meeting: Part = partial(_where, backward, longest - least, 0.0)
    for c in _experts(forward.patterns):
        behind = _stream(backward, c)
        stream = (_stream(forward, c), behind)
        yield Row(f"stream {c}", stream, stream, both, begins=c, ends=c)
        first = (_of(forward, "forward_first"), behind)
        yield Row(f"turn {c}", first, (*first, meeting), least + forward.least_dense + dense)
        for a, seconds in head.items():
            more = backward.slowest - own[a]
            waiting: Part = partial(_where, backward, more, 0.0)
            turn = (_stream(forward, a), behind)
            begin = forward.n * float(forward.dense[a, 0])
            yield Row(f"turn {a} {c}", turn, (*turn, waiting), begin + seconds + own[a] + dense, begins=a)
