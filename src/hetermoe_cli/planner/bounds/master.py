"""Lower bound from patterns: the best mixture of patterns over the layers (an LP, solved by column generation).

A multiset of patterns stands for every placement; its order over the layers is left open, and fractions are allowed.
Any multipliers of the rows prove a bound, so that a run may stop as soon as the bound is good enough.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.planner.arrays import FloatArray, IntArray
from hetermoe_cli.planner.bounds.chains import canonical
from hetermoe_cli.planner.bounds.patterns import Limits, Patterns, all_patterns, caps_within
from hetermoe_cli.planner.bounds.potentials import better_chains
from hetermoe_cli.planner.bounds.restricted import Restricted
from hetermoe_cli.planner.bounds.rows import Of, Rows
from hetermoe_cli.planner.instance.rates import Rates

ROUNDS = 80
PRECISION = 5e-4
FIRST_COLUMNS = 40
NEW_COLUMNS = 6
CHAIN_ROUNDS = 12  # of new chains
FEW = 250  # patterns times layers: where a MILP takes less time than a search for better chains
CHAIN_GAIN = 5e-4  # of the bound: what new chains must add to go on


@dataclass(frozen=True)
class Mixture:
    """Lower bound in seconds, and layers per pattern ([patterns, classes + 1], last column replicated; weights)."""

    bound: float
    tables: IntArray
    weights: FloatArray
    limits: Limits


def mixture(rates: Rates, horizon: float, *, mixed: bool = False) -> Mixture | None:
    """Bound on every placement of the choice that is faster than `horizon`; None where it has too many patterns, or a
    single layer: chains are about what is between layers.

    The bound is infinite where no placement can be that fast. `mixed` takes longer and bounds better: by chains that
    change from event to event.
    """
    caps, copies = caps_within(rates, horizon)
    patterns = all_patterns(rates, caps, copies)
    if patterns is None or rates.layers == 1:
        return None
    if not len(patterns.replicated):
        nothing = np.zeros((0, len(caps) + 1), dtype=np.int64)
        return Mixture(np.inf, nothing, np.zeros(0), Limits.of(rates, horizon))
    return _Run(rates, horizon, patterns).found(mixed)


class _Run:
    """Adds patterns that promise most until the bound is within PRECISION of the mixture, or above the horizon; then
    chains that are longer for the mixture."""

    def __init__(self, rates: Rates, horizon: float, patterns: Patterns) -> None:
        self.rates, self.horizon = rates, horizon
        self.rows = Rows(patterns)
        self.rows.extend(canonical(self.rows.layers))
        self.master = Restricted(self.rows, horizon)
        self.best = _Proof(self.rows, np.zeros(len(self.rows.rows)), -np.inf, 0.0, 0.0)
        self.master.add(_first(self.rows))

    def found(self, mixed: bool) -> Mixture:
        """The bound, and what is left of the patterns."""
        self._columns()
        many = len(self.rows.patterns.replicated) * self.rates.layers > FEW
        for _ in range(CHAIN_ROUNDS if mixed and many else 0):
            before = self.best.bound
            chains = better_chains(self.master.part, *self.master.mixture_weights()) if before < self.horizon else []
            if not chains:
                break
            self.rows.extend(chains)
            self.master.extend(chains)
            self._columns()
            if self.best.bound < before * (1 + CHAIN_GAIN):
                break
        chosen, used = self.master.mixture()
        patterns, limits = self.rows.patterns, self.best.limits(self.horizon)
        tables = np.vstack([patterns.totals, patterns.replicated]).T
        bound = self.best.bound if limits else np.inf
        return Mixture(bound, tables[chosen], used, limits or Limits.of(self.rates, self.horizon))

    def _columns(self) -> None:
        layers, base = self.rates.layers, self.rates.around_compute
        for _ in range(ROUNDS):
            value, weights = self.master.solve()
            every, last = self.rows.weigh(weights, last=False), self.rows.weigh(weights, last=True)
            proven = float((layers - 1) * every.min() + last.min() + weights @ self.rows.constants + base)
            if proven > self.best.bound:
                self.best = _Proof(self.rows, weights, proven, float(every.min()), float(last.min()))
            if proven >= self.horizon or value + base - self.best.bound <= PRECISION * value:
                break
            self.master.add(np.union1d(_smallest(every, NEW_COLUMNS), _smallest(last, NEW_COLUMNS)))


@dataclass(frozen=True)
class _Proof:
    """Row weights with the bound that they prove; any layer, and the last one, add at least `every` and `last`."""

    rows: Rows
    weights: FloatArray
    bound: float
    every: float
    last: float

    def limits(self, horizon: float) -> Limits | None:
        """What is left of the patterns: others alone lift the bound above `horizon`. None where none is left."""
        kept = self._kept(self.rows, horizon)
        if not kept.any():
            return None
        patterns = self.rows.patterns
        tables = np.vstack([patterns.totals, patterns.replicated])[:, kept]
        partial = [self._partial(c, kept, horizon) for c in range(len(patterns.totals))]
        return Limits(tuple(tables.min(1).tolist()), tuple(tables.max(1).tolist()), tuple(partial))

    def _kept(self, rows: Rows, horizon: float) -> NDArray[np.bool_]:
        slack = horizon - self.bound
        every, last = rows.weigh(self.weights, last=False), rows.weigh(self.weights, last=True)
        result: NDArray[np.bool_] = (every - self.every < slack) | (last - self.last < slack)
        return result

    def _partial(self, c: int, kept: NDArray[np.bool_], horizon: float) -> int:
        """Most experts of class `c` in a layer where one of its devices hosts none."""
        patterns = self.rows.patterns
        if patterns.sizes[c, 0] == 1:
            return 0
        idle = self.rows.of(replace(patterns.subset(np.flatnonzero(kept)), idle=c))
        left = self._kept(idle, horizon) & (idle.patterns.fullest[c] <= patterns.caps[c])
        return int(idle.patterns.totals[c][left].max(initial=0))


def _first(rows: Rows) -> IntArray:
    """Patterns whose busiest class has least to do."""
    return np.union1d(_smallest(rows.busiest, FIRST_COLUMNS), rows.patterns.totals.argmax(1))


def _smallest(values: FloatArray, count: int) -> IntArray:
    """Indices of the smallest values, in no order."""
    return np.argpartition(values, count)[:count] if count < len(values) else np.arange(len(values))


def uniform(rates: Rates, horizon: float, count: int) -> IntArray:
    """[count, classes + 1] the best patterns that give every device of a class as much, if all layers have them."""
    caps, copies = caps_within(rates, horizon)
    patterns = all_patterns(rates, caps, copies, even=True)
    if patterns is None or not len(patterns.replicated):
        return np.zeros((0, len(caps) + 1), dtype=np.int64)
    rows = Rows(patterns)
    rows.extend(canonical(rows.layers))
    every, last = rows.values
    value = (rates.layers - 1) * every + last + rows.constants[:, None]
    times = rows.makespan(value) + value[rows.index(Of.STEP)].max(0)
    times[(value[rows.index(Of.MEMORY)] > 0).any(0)] = np.inf
    tables = np.vstack([patterns.totals, patterns.replicated]).T
    return tables[_smallest(times, count)]
