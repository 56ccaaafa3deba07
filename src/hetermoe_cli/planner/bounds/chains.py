"""Chains: paths through the task graph whose length is a sum over layers, whatever the order of patterns.

A chain stands at one event of every border between layers (borders.py). It has a *potential* for every event that it
may stand at, infinite for others. With a_s = when event s happens, V = max over s of a_s - potential_s grows in each
layer by at least the least over s of potential_s + max over t of (way from s to t) - potential_t, so that the sum of
these bounds the iteration, for any potentials (as in a game in which somebody else chooses s, and the chain t).

A forward chain reaches the end of some head of one attending class, a backward chain starts there.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import inf
from typing import Literal

import numpy as np

from hetermoe_cli.planner.arrays import FloatArray, choose, largest
from hetermoe_cli.planner.bounds.borders import CREDIT, EARLY, FIRST, HELD, LAST, PORT, REDUCED, SAME, STREAM, Times
from hetermoe_cli.planner.bounds.borders_backward import backward_times, least_reduce
from hetermoe_cli.planner.bounds.borders_forward import forward_times
from hetermoe_cli.planner.bounds.sides import Side

Potentials = tuple[tuple[int, float], ...]  # of the events that a chain may stand at
Part = Literal["forward", "earlier", "last"]  # earlier: backward pass of a window before the last one


@dataclass(frozen=True)
class Family:
    """Chains that can be put together: forward ones up to a head of class `c`, backward ones from there, by windows.

    `heads`: all heads of the class lie between, or those after the first, so that the chain goes on from either the
    first or all of them. `own`: of several attending classes' windows, chains that begin and end on this class;
    None: chains that begin and end with any of them, or that there is no such difference.
    """

    c: int
    heads: Literal["all", "first"]
    own: bool | None = None


class Layers:
    """What chains are made of, for some patterns."""

    def __init__(self, forward: Side, backward: Side) -> None:
        self.forward, self.backward = forward, backward
        rates = forward.patterns.rates
        self.windows = rates.choice.schedule.micro_batches // rates.choice.schedule.window
        self.n, self.head = forward.n, [r.head for r in rates.of]
        self.reduce_more = rates.reduces[-1][0] - least_reduce(backward)
        self.none: FloatArray = np.full(len(forward.d), -inf)
        self.parts: list[Part] = ["forward", "last"] if self.windows == 1 else ["forward", "earlier", "last"]

    @cached_property
    def forward_times(self) -> Times:
        """From border to border."""
        return forward_times(self.forward)

    @cached_property
    def backward_times(self) -> Times:
        """From border to border."""
        return backward_times(self.backward)

    @cached_property
    def families(self) -> list[Family]:
        """All families of the choice."""
        classes, several = self.forward.attending, len(self.forward.attending) > 1 and self.windows > 1
        owns = (True, False) if several else (None,)
        return [Family(c, heads, own) for c, heads, own in product(classes, ("all", "first"), owns)]  # type: ignore[arg-type]

    def times(self, part: Part) -> int:
        """How often an iteration goes through the part."""
        return {"forward": self.windows, "earlier": self.windows - 1, "last": 1}[part]

    def events(self, family: Family, part: Part) -> list[int]:
        """Events that chains of the family may stand at."""
        side = self.forward
        streams = [STREAM + c for c in (*side.hosting, *([family.c] if family.own else side.attending))]
        if part == "forward":
            return [FIRST, *SAME, *streams]
        ends = [*SAME] if family.own else [FIRST, *SAME, EARLY]
        reduced = [REDUCED, CREDIT] if part == "last" and side.patterns.rates.ring else []
        return [*ends, *reduced, *streams]

    def starts(self, family: Family, pure: bool) -> dict[int, float]:
        """Events before layer 0, seconds after the window's start. `pure`: a chain that stays at one event."""
        side, dense = self.forward, self.forward.least_dense
        all_but_one = (side.n - 1) * side.fastest + side.n * dense
        apart = 0.0 if family.own is None else side.slowest - side.fastest
        events = {FIRST: dense, LAST: all_but_one, PORT: min(all_but_one, side.slowest + dense)}
        starts = {int(event): seconds - apart for event, seconds in events.items()}
        starts |= {STREAM + e: -apart for e in side.hosting}
        times = side.n if pure and side.patterns.rates.layers > 1 else 1
        own = {STREAM + c: times * float(side.dense[c, 0]) for c in side.attending}
        if family.own:
            return {STREAM + family.c: own[STREAM + family.c]}
        return starts | (own if family.own is None else {})

    def ends(self, family: Family) -> dict[int, float]:
        """What is left of a window after each event below layer 0."""
        side, dense = self.backward, self.backward.least_dense
        own = {STREAM + c: float(side.dense[c, 0]) for c in side.attending}
        last = side.slowest + dense
        if family.own:
            last = float(side.attention[family.c, 0] + side.dense[family.c, 0])
        ends = {LAST: last, PORT: last, HELD: last, EARLY: dense, FIRST: (side.n - 1) * side.fastest + side.n * dense}
        ends |= {REDUCED: 0.0, CREDIT: 0.0}
        return {int(event): seconds for event, seconds in ends.items()} | {STREAM + e: last for e in side.hosting} | own

    def before_heads(self, family: Family) -> dict[int, float]:
        """From each event after the last layer to the family's head."""
        n = self.n if family.heads == "all" else 1
        head = self.head[family.c]
        after = {int(FIRST): n * head, STREAM + family.c: n * head}
        return after | ({int(LAST): head} if family.heads == "all" else {})

    def after_heads(self, family: Family) -> dict[int, float]:
        """From the family's head to each event above the last layer."""
        rest = 0.0 if family.heads == "all" else (self.n - 1) * self.head[family.c]
        after = {int(EARLY): rest, STREAM + family.c: rest}
        return after if family.heads == "all" else after | {int(FIRST): 0.0}


@dataclass(frozen=True)
class Chain:
    """A row: seconds of a part of the family's chains >= constant + the sum over all layers."""

    family: Family
    part: Part
    potentials: Potentials

    @property
    def pure(self) -> bool:
        """Whether it stays at one event."""
        return len(self.potentials) == 1

    def constant(self, layers: Layers) -> float:
        """Seconds that belong to no layer."""
        if self.part == "forward":
            starts = layers.starts(self.family, self.pure)
            return max(starts.get(event, -inf) - worth for event, worth in self.potentials)
        ends = layers.ends(self.family)
        return min(ends[event] + worth for event, worth in self.potentials)

    def every(self, layers: Layers) -> FloatArray:
        """[patterns] seconds of a layer that is not the last."""
        times = layers.forward_times if self.part == "forward" else layers.backward_times
        return _least([self._onward(times, event) + worth for event, worth in self.potentials])

    def last(self, layers: Layers) -> FloatArray:
        """[patterns] seconds of the last layer and of heads."""
        if self.part == "forward":
            return _least([to_heads(layers, self.family, event) + worth for event, worth in self.potentials])
        return largest([way - worth for event, worth in self.potentials for way in from_heads(layers, self, event)])

    def _onward(self, times: Times, event: int) -> FloatArray:
        ways = [times[event, t] - worth for t, worth in self.potentials if (event, t) in times]
        return largest(ways)


def to_heads(layers: Layers, family: Family, event: int) -> FloatArray:
    """[patterns] from an event above the last layer to the family's head."""
    times, left = layers.forward_times, layers.before_heads(family)
    return largest([times[event, t] + seconds for t, seconds in left.items() if (event, t) in times])


def from_heads(layers: Layers, chain: Chain, event: int) -> list[FloatArray]:
    """[patterns] ways from the family's head to an event below the last layer, whose all-reduce is the head's.

    Where the last layer is replicated its first combine does not follow the first head.
    """
    times, more = layers.backward_times, layers.reduce_more if event in (REDUCED, CREDIT) else 0.0
    ways = []
    for s, seconds in layers.after_heads(chain.family).items():
        if (s, event) in times:
            way = times[s, event] + (seconds + more)
            ways.append(choose(layers.forward.any, way, -inf) if s == FIRST else way)
    return ways or [layers.none]


def canonical(layers: Layers) -> list[Chain]:
    """Chains that stay at one event."""
    found = []
    for family in layers.families:
        for part in layers.parts:
            for event in layers.events(family, part):
                chain = Chain(family, part, ((event, 0.0),))
                if chain.constant(layers) > -inf:
                    found.append(chain)
    return found


def _least(ways: list[FloatArray]) -> FloatArray:
    result: FloatArray = np.minimum.reduce(ways)
    return result
