"""Lower bound from patterns: the best mixture of patterns over the layers (an LP, solved by column generation).

A multiset of patterns stands for every placement; its order over the layers is left open, and fractions are allowed.
Any multipliers of the rows prove a bound, so that a run may stop as soon as the bound is good enough.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.planner.arrays import FloatArray, IntArray, largest, total
from hetermoe_cli.planner.chains import Row, rows_of
from hetermoe_cli.planner.patterns import Limits, Patterns, all_patterns, caps_within
from hetermoe_cli.planner.rates import Rates
from hetermoe_cli.planner.sides import Side

ROUNDS = 80
PRECISION = 5e-4
FIRST_COLUMNS = 40
NEW_COLUMNS = 6


@dataclass(frozen=True)
class Mixture:
    """Lower bound in seconds, and layers per pattern ([patterns, classes + 1], last column replicated; weights)."""

    bound: float
    tables: IntArray
    weights: FloatArray
    limits: Limits


def mixture(rates: Rates, horizon: float, *, mixed: bool = False) -> Mixture | None:
    """Bound on every placement of the choice that is faster than `horizon`; None where it has too many patterns.

    The bound is infinite where no placement can be that fast. `mixed` takes longer and bounds a little better.
    """
    caps, copies = caps_within(rates, horizon)
    patterns = all_patterns(rates, caps, copies)
    if patterns is None:
        return None
    if not len(patterns.replicated):
        nothing = np.zeros((0, len(caps) + 1), dtype=np.int64)
        return Mixture(np.inf, nothing, np.zeros(0), Limits.of(rates, horizon))
    sides = Side(patterns, 0), Side(patterns, 1)
    found = _run(Rows(*sides, mixed=False), horizon)
    if found.bound >= horizon or not mixed or rates.choice.schedule.window == 1:
        return found
    better = _run(Rows(*sides, mixed=True), horizon)
    return better if better.bound > found.bound else found


class Rows:
    """All rows of some patterns: chains and all-reduces, then optimizer steps and memory of every class.

    A row says: variable >= constant + sum over layers; the variable is the makespan without layer 0's all-reduce and
    what follows, the optimizer step, or nothing.
    """

    def __init__(self, forward: Side, backward: Side, mixed: bool) -> None:
        self.sides, self.mixed, self.patterns = (forward, backward), mixed, forward.patterns
        self.rates = self.patterns.rates
        chains = [*rows_of(*self.sides, mixed), self._reduces()]
        classes = range(len(self.rates.classes))
        self.rows = [*chains, *map(self._step, classes), *map(self._memory, classes)]
        self.kinds = np.repeat([0, 1, 2], [len(chains), len(classes), len(classes)])
        self.constants = np.array([row.constant for row in self.rows])

    def of(self, patterns: Patterns) -> "Rows":
        """The same rows of other patterns."""
        return Rows(Side(patterns, 0), Side(patterns, 1), self.mixed)

    @property
    def busiest(self) -> FloatArray:
        """[patterns] compute of the class that has most in a layer."""
        return largest([*(self.sides[0].stream + self.sides[1].stream)])

    def _reduces(self) -> Row:
        """All-reduces one after another, from the last head on."""
        schedule, rates = self.rates.choice.schedule, self.rates
        reduces, each = rates.reduces, rates.reduces[-2][1]
        start = 0.0
        for r, c in zip(rates.of, rates.classes, strict=True):
            if c.attends:
                both = schedule.micro_batches * r.attending(rates.layers)
                start = max(start, both - schedule.window * (rates.layers * r.attention[1] + r.dense[1]))

        def copies() -> FloatArray:
            return np.asarray(each * self.patterns.replicated, dtype=np.float64)

        return Row("reduce", (copies,), (copies,), start + sum(base for base, _ in reduces[1:]))

    def _step(self, c: int) -> Row:
        r = self.rates.of[c]

        def held() -> FloatArray:
            p = self.patterns
            result: FloatArray = r.optimizer_per_expert * p.mean[c] + r.optimizer_per_copy * p.replicated
            return result

        return Row("step", (held,), (held,), r.optimizer_base)

    def _memory(self, c: int) -> Row:
        r, attends = self.rates.of[c], self.rates.classes[c].attends

        def used() -> FloatArray:
            p = self.patterns
            each = r.memory_per_hosted + r.memory_per_share / self.rates.layers
            copies = p.replicated * (attends * (r.memory_per_replicated + r.memory_per_copy / self.rates.layers))
            result: FloatArray = (p.mean[c] * each + copies) / r.memory_limit
            return result

        return Row("memory", (used,), (used,), r.memory_base / r.memory_limit - 1)

    def weigh(self, weights: FloatArray, *, last: bool) -> FloatArray:
        """[patterns] weighted sum of the rows."""
        result = np.zeros(len(self.patterns.replicated))
        for row, weight in zip(self.rows, weights, strict=True):
            if weight > 0:
                for part in row.last if last else row.every:
                    result = result + weight * part()
        return result

    @cached_property
    def values(self) -> tuple[FloatArray, FloatArray]:
        """[rows, patterns] of any layer, and of the last."""
        every = [total(part() for part in row.every) for row in self.rows]
        return np.array(every), np.array([total(part() for part in row.last) for row in self.rows])


def _run(rows: Rows, horizon: float) -> Mixture:
    """Add the patterns that promise most until the bound is within PRECISION of the mixture, or above horizon."""
    layers, base = rows.rates.layers, rows.rates.after_compute
    master, best = _Restricted(rows, horizon), _Proof(rows, np.zeros(len(rows.rows)), -np.inf, 0.0, 0.0)
    master.add(_first(rows))
    for _ in range(ROUNDS):
        value, weights = master.solve()
        every, last = rows.weigh(weights, last=False), rows.weigh(weights, last=True)
        proven = float((layers - 1) * every.min() + last.min() + weights @ rows.constants + base)
        if proven > best.bound:
            best = _Proof(rows, weights, proven, float(every.min()), float(last.min()))
        if proven >= horizon or value + base - best.bound <= PRECISION * value:
            break
        master.add(np.union1d(_smallest(every, NEW_COLUMNS), _smallest(last, NEW_COLUMNS)))
    chosen, used = master.mixture()
    tables = np.vstack([rows.patterns.totals, rows.patterns.replicated]).T
    limits = best.limits(horizon)
    return Mixture(best.bound if limits else np.inf, tables[chosen], used, limits or Limits.of(rows.rates, horizon))


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
    rows = Rows(Side(patterns, 0), Side(patterns, 1), mixed=False)
    every, last = rows.values
    value = (rates.layers - 1) * every + last + rows.constants[:, None]
    times = value[rows.kinds == 0].max(0) + value[rows.kinds == 1].max(0)
    times[(value[rows.kinds == 2] > 0).any(0)] = np.inf
    tables = np.vstack([patterns.totals, patterns.replicated]).T
    return tables[_smallest(times, count)]


class _Restricted:
    """The LP over the patterns added so far, in HiGHS, which goes on from its last basis."""

    def __init__(self, rows: Rows, horizon: float) -> None:
        import highspy

        from hetermoe_cli.planner.solver import THREADS, silent_stdout

        self.rows, self.columns = rows, np.zeros(0, dtype=np.int64)
        with silent_stdout():
            self.highs = highspy.Highs()  # type: ignore[no-untyped-call]
        self.highs.setOptionValue("output_flag", False)
        self.highs.setOptionValue("threads", THREADS)  # one pool per process, of one size
        nothing, infinity = np.array([], dtype=np.int32), highspy.kHighsInf
        for constant in rows.constants:
            self.highs.addRow(float(constant), infinity, 0, nothing, np.array([]))
        for layers in (rows.rates.layers - 1, 1):
            self.highs.addRow(float(layers), float(layers), 0, nothing, np.array([]))
        # makespan, optimizer step, and memory in excess, at a price, so that the first few patterns need not fit
        for kind, price in ((0, 1.0), (1, 1.0), (2, 100 * horizon)):
            index = np.flatnonzero(rows.kinds == kind).astype(np.int32)
            self.highs.addCol(price, 0.0, infinity, len(index), index, np.ones(len(index)))

    def add(self, patterns: IntArray) -> None:
        """Allow more patterns, in the last layer and in the others."""
        new = np.setdiff1d(patterns, self.columns)
        if not len(new):
            return
        part = self.rows.of(self.rows.patterns.subset(new))
        count = len(part.rows)
        for last, values in enumerate(part.values):
            index = np.append(np.arange(count), count + 1 - last if last == 0 else count + 1).astype(np.int32)
            index[-1] = count + last
            for column in values.T:
                self.highs.addCol(0.0, 0.0, 1e30, count + 1, index, np.append(-column, 1.0))
        self.columns = np.concatenate([self.columns, new])
        self.order = np.concatenate([getattr(self, "order", np.zeros(0, dtype=np.int64)), new, new])

    def solve(self) -> tuple[float, FloatArray]:
        """Value without what follows compute, and row weights that prove a bound."""
        self.highs.run()
        duals = np.maximum(np.array(self.highs.getSolution().row_dual)[: len(self.rows.rows)], 0.0)
        for kind in (0, 1):
            rows = self.rows.kinds == kind
            total = duals[rows].sum()
            duals[rows] = duals[rows] / total if total > 0 else 1 / rows.sum()
        return float(self.highs.getInfo().objective_function_value), duals

    def mixture(self) -> tuple[IntArray, FloatArray]:
        """Patterns in use, and for how many layers."""
        values = np.array(self.highs.getSolution().col_value)[3:]
        total: dict[int, float] = {}
        for pattern, value in zip(self.order.tolist(), values, strict=True):
            if value > 1e-6:
                total[pattern] = total.get(pattern, 0.0) + float(value)
        return np.array(list(total), dtype=np.int64), np.array(list(total.values()))
