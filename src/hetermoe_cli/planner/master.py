"""Lower bound from patterns: the best mixture of patterns over the layers (an LP, solved by column generation).

A multiset of patterns stands for every placement; its order over the layers is left open, and fractions are allowed.
Any multipliers of the rows prove a bound, so that a run may stop as soon as the bound is good enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hetermoe_cli.planner.chains import Row, sequential_rows, zebra_rows
from hetermoe_cli.planner.counts import FloatArray, IntArray
from hetermoe_cli.planner.patterns import Limits, Patterns, all_patterns, caps_within
from hetermoe_cli.planner.rates import Rates

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


def mixture(rates: Rates, horizon: float) -> Mixture | None:
    """Bound on every placement of the choice that is faster than `horizon`; None where it has too many patterns.

    The bound is infinite where no placement can be that fast.
    """
    caps, copies = caps_within(rates, horizon)
    patterns = all_patterns(rates, caps, copies)
    if patterns is None:
        return None
    if not len(patterns.replicated):
        nothing = np.zeros((0, len(caps) + 1), dtype=np.int64)
        return Mixture(np.inf, nothing, np.zeros(0), Limits.of(rates, horizon))
    return _run(Rows(patterns), horizon)


class Rows:
    """All rows of `patterns`: chains, then optimizer steps and memory of every class.

    A row says: variable >= constant + sum over layers; the variable is the makespan without all-reduce and optimizer,
    the optimizer step, or nothing.
    """

    def __init__(self, patterns: Patterns) -> None:
        self.patterns, self.rates = patterns, patterns.rates
        sequential = self.rates.choice.schedule.name == "sequential"
        chains = sequential_rows(patterns) if sequential else zebra_rows(patterns)
        classes = range(len(self.rates.classes))
        self.rows = [*chains, *map(self._step, classes), *map(self._memory, classes)]
        self.kinds = np.repeat([0, 1, 2], [len(chains), len(classes), len(classes)])
        self.constants = np.array([row.constant for row in self.rows])

    @property
    def price(self) -> FloatArray:
        """[patterns] seconds that a layer's copies add to the all-reduce."""
        result: FloatArray = self.rates.synchronise[1] * self.patterns.replicated
        return result

    def _step(self, c: int) -> Row:
        r, attends = self.rates.of[c], self.rates.classes[c].attends

        def held() -> FloatArray:
            return r.optimizer_per_expert * (self.patterns.mean[c] + self.patterns.replicated * attends)

        return Row("step", (held,), (held,), r.optimizer_base)

    def _memory(self, c: int) -> Row:
        r, attends = self.rates.of[c], self.rates.classes[c].attends

        def used() -> FloatArray:
            p = self.patterns
            buffers = p.fullest[c] * (r.memory_per_share / self.rates.layers)
            copies = p.replicated * (attends * r.memory_per_replicated)
            result: FloatArray = (p.mean[c] * r.memory_per_hosted + buffers + copies) / r.memory_limit
            return result

        return Row("memory", (used,), (used,), r.memory_base / r.memory_limit - 1)

    def weigh(self, weights: FloatArray, *, last: bool) -> FloatArray:
        """[patterns] weighted sum of the rows, and the price."""
        result = self.price
        for row, weight in zip(self.rows, weights, strict=True):
            if weight > 0:
                for part in row.last if last else row.every:
                    result = result + weight * part()
        return result

    @cached_property
    def values(self) -> tuple[FloatArray, FloatArray]:
        """[rows, patterns] of any layer, and of the last."""
        every = [sum(part() for part in row.every) for row in self.rows]
        return np.array(every), np.array([sum(part() for part in row.last) for row in self.rows])


def _run(rows: Rows, horizon: float) -> Mixture:
    """Add the patterns that promise most until the bound is within PRECISION of the mixture, or above horizon."""
    layers, base = rows.rates.layers, rows.rates.synchronise[0]
    master, bound = _Restricted(rows, horizon), -np.inf
    master.add(_first(rows))
    for _ in range(ROUNDS):
        value, weights = master.solve()
        every, last = rows.weigh(weights, last=False), rows.weigh(weights, last=True)
        proven = (layers - 1) * every.min() + last.min() + weights @ rows.constants + base
        if proven > bound:
            bound, kept = (
                float(proven),
                (every - every.min() < horizon - proven) | (last - last.min() < horizon - proven),
            )
        if bound >= horizon or value + base - bound <= PRECISION * value:
            break
        master.add(np.union1d(np.argsort(every)[:NEW_COLUMNS], np.argsort(last)[:NEW_COLUMNS]))
    chosen, used = master.mixture()
    tables = np.vstack([rows.patterns.totals, rows.patterns.replicated]).T
    if not kept.any():
        bound, kept = np.inf, ~kept
    limits = Limits(tuple(tables[kept].min(0).tolist()), tuple(tables[kept].max(0).tolist()))
    return Mixture(bound, tables[chosen], used, limits)


def _first(rows: Rows) -> IntArray:
    """Patterns whose busiest class has least to do."""
    streams = [row for row in rows.rows if row.name.startswith("stream")]
    busiest = np.maximum.reduce(
        [sum(part() for part in row.every) + row.constant / rows.rates.layers for row in streams]
    )
    corners = rows.patterns.totals.argmax(1)
    return np.union1d(np.argsort(busiest, kind="stable")[:FIRST_COLUMNS], corners)


class _Restricted:
    """The LP over the patterns added so far, in HiGHS, which goes on from its last basis."""

    def __init__(self, rows: Rows, horizon: float) -> None:
        import highspy

        from hetermoe_cli.planner.solver import THREADS, silent_stdout

        self.rows, self.columns = rows, np.zeros(0, dtype=np.int64)
        with silent_stdout():
            self.highs = highspy.Highs()
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
        part = Rows(self.rows.patterns.subset(new))
        count = len(part.rows)
        for last, values in enumerate(part.values):
            index = np.append(np.arange(count), count + 1 - last if last == 0 else count + 1).astype(np.int32)
            index[-1] = count + last
            for column, price in zip(values.T, part.price, strict=True):
                self.highs.addCol(float(price), 0.0, 1e30, count + 1, index, np.append(-column, 1.0))
        self.columns = np.concatenate([self.columns, new])
        self.order = np.concatenate([getattr(self, "order", np.zeros(0, dtype=np.int64)), new, new])

    def solve(self) -> tuple[float, FloatArray]:
        """Value without the all-reduce of dense gradients, and row weights that prove a bound."""
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
