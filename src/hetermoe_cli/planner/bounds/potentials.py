"""Better chains: potentials that make a family's chains longest for one mixture of patterns.

A chain's length is, for fixed ways onward from every event, linear in its potentials. So an LP finds the best
potentials, they choose the ways anew, and so on: the length only grows (as in policy iteration; a local optimum).
"""

from dataclasses import dataclass, replace
from math import inf

import numpy as np

from hetermoe_cli.planner.arrays import FloatArray
from hetermoe_cli.planner.bounds.chains import Chain, Family, Layers, Part, from_heads, to_heads
from hetermoe_cli.planner.bounds.policy import PotentialsLP
from hetermoe_cli.planner.bounds.rows import Of, Rows
from hetermoe_cli.planner.bounds.sides import Side

FAMILIES = 3  # that are improved at once
DRAWN = 3000  # potentials drawn at random, of random events, as every start may end in a local optimum
STARTS = 6  # the longest of these are improved
ITERATIONS = 8
FLOOR = 1e9
GAIN = 2e-4  # of the part's length: what a new chain must add


def better_chains(rows: Rows, every: FloatArray, last: FloatArray) -> list[Chain]:
    """Chains that are longer than all in `rows` for so many layers of each of its patterns (but the last one; last)."""
    values = rows.values
    lengths = values[0] @ every + values[1] @ last + rows.constants
    support = np.flatnonzero(every + last)
    patterns = rows.patterns.subset(support)
    layers = Layers(Side(patterns, 0), Side(patterns, 1))
    weights = every[support], last[support]
    found: list[Chain] = []
    for family in _longest_families(rows, lengths):
        for part in layers.parts:
            index = sorted(rows.index(Of.CHAIN, family, part), key=lambda row: -lengths[row])
            if not index:
                continue
            problem = Stretch(layers, family, part, *weights)
            better, length = problem.best(rows.chains[index[0] - rows.fixed])
            if length > float(lengths[index[0]]) + GAIN * float(lengths.max()):
                found.append(better)
    return found


def _longest_families(rows: Rows, lengths: FloatArray) -> list[Family]:
    """The families whose chains together are longest."""

    def together(family: Family) -> float:
        parts = [(part, rows.index(Of.CHAIN, family, part)) for part in rows.layers.parts]
        return sum(rows.layers.times(part) * float(lengths[index].max()) for part, index in parts if index)

    return sorted(rows.layers.families, key=together, reverse=True)[:FAMILIES]


@dataclass
class Stretch:
    """One family's part, for a mixture of patterns (layers of each, the last one apart).

    `ways` [events, events, patterns]: from border to border; `edge` [events]: what lies before events above layer 0,
    or after those below it; `heads` [events, patterns]: from an event to the heads, or from there.
    """

    layers: Layers
    family: Family
    part: Part
    every: FloatArray
    last: FloatArray

    def __post_init__(self) -> None:
        times = self.layers.forward_times if self.part == "forward" else self.layers.backward_times
        self.events = self.layers.events(self.family, self.part)
        count, patterns = len(self.events), len(self.every)
        self.ways = np.full((count, count, patterns), -inf)
        for i, s in enumerate(self.events):
            for j, t in enumerate(self.events):
                if (s, t) in times:
                    self.ways[i, j] = times[s, t]
        empty = Chain(self.family, self.part, ())
        if self.part == "forward":
            starts = self.layers.starts(self.family, False)
            self.edge = np.array([starts.get(event, -inf) for event in self.events])
            self.heads = np.array([to_heads(self.layers, self.family, event) for event in self.events])
        else:
            ends = self.layers.ends(self.family)
            self.edge = np.array([ends[event] for event in self.events])
            self.heads = np.array([np.max(from_heads(self.layers, empty, event), axis=0) for event in self.events])
        self.reach = float(np.abs(self.ways[np.isfinite(self.ways)]).max(initial=0.0))
        self.most = 4 * self.reach * max(2.0, self.every.sum())

    def best(self, chain: Chain) -> tuple[Chain, float]:
        """The longest chain found from this one and from potentials drawn at random, and its length."""
        known = dict(chain.potentials)
        own = np.array([known.get(event, self.most) for event in self.events])
        drawn = self._drawn()
        starts = drawn[np.argsort(-self.lengths(drawn))[:STARTS]]
        worth = max((self._improved(start) for start in (own, *starts)), key=self.length)
        kept = [(event, float(w)) for event, w in zip(self.events, worth, strict=True) if w < 0.9 * self.most]
        better = replace(chain, potentials=tuple(kept))
        return better, self._exact(better)

    def _drawn(self) -> FloatArray:
        draw, shape = np.random.default_rng(0), (DRAWN, len(self.events))
        worth = draw.uniform(-self.reach, self.reach, shape) * draw.random((DRAWN, 1)) ** 2
        drawn: FloatArray = np.where(draw.random(shape) < draw.random((DRAWN, 1)), self.most, worth)
        usable: FloatArray = drawn[(drawn < self.most).any(1)]
        return usable

    def _improved(self, worth: FloatArray) -> FloatArray:
        length = self.length(worth)
        for _ in range(ITERATIONS):
            new = PotentialsLP(self, worth).solve()
            if new is None or (grown := self.length(new)) <= length * (1 + 1e-6):
                break
            worth, length = new, grown
        return worth

    def _exact(self, chain: Chain) -> float:
        if not chain.potentials or (constant := chain.constant(self.layers)) == -inf:
            return -inf
        floor = -self.layers.forward.patterns.rates.serial
        every, last = (np.maximum(part(self.layers), floor) for part in (chain.every, chain.last))
        return float(constant + every @ self.every + last @ self.last)

    def length(self, worth: FloatArray) -> float:
        """Seconds of the chain with these potentials."""
        return float(self.lengths(worth[None])[0])

    def lengths(self, worth: FloatArray) -> FloatArray:
        """[starts] seconds of the chains with potentials [starts, events]."""
        onward = (self.ways[None] - worth[:, None, :, None]).max(2)
        every = (onward + worth[:, :, None]).min(1)
        if self.part == "forward":
            last, edge = (self.heads[None] + worth[:, :, None]).min(1), (self.edge - worth).max(1)
        else:
            last, edge = (self.heads[None] - worth[:, :, None]).max(1), (self.edge + worth).min(1)
        every, last = (np.maximum(part, -FLOOR * self.most) for part in (every, last))  # no infinity times zero layers
        result: FloatArray = every @ self.every + last @ self.last + edge
        return result
