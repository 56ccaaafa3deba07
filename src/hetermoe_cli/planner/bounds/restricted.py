"""The LP over some patterns and some chains, in HiGHS, which goes on from its last basis."""

from collections.abc import Sequence

import highspy
import numpy as np

from hetermoe_cli.planner.arrays import FloatArray, IntArray
from hetermoe_cli.planner.bounds.chains import Chain
from hetermoe_cli.planner.bounds.rows import Of, Rows
from hetermoe_cli.planner.solver import quiet_highs

LAYERS = 2  # the first rows: how many layers have a pattern, the last one and the others


class Restricted:
    """Rows: layers, then families (the makespan is at least their parts), then those of `rows`.

    Columns: the makespan, the optimizer step, memory in excess, the parts of families, then patterns, in pairs: in any
    layer but the last, and in the last.
    """

    def __init__(self, rows: Rows, horizon: float) -> None:
        self.rows, self.used = rows, np.zeros(0, dtype=np.int64)
        self.part = rows.of(rows.patterns.subset(self.used))
        self.infinity, self.highs = highspy.kHighsInf, quiet_highs()
        layers, self.families = rows.layers, rows.layers.families
        for number in (rows.rates.layers - 1, 1):
            self._row(float(number), float(number), [], [])
        for _ in self.families:
            self._row(0.0, self.infinity, [], [])
        self.first = LAYERS + len(self.families)
        for constant in rows.constants.tolist():
            self._row(constant, self.infinity, [], [])
        # memory in excess has a price, so that the first few patterns need not fit
        links = range(LAYERS, self.first)
        self._variable(1.0, rows.index(Of.WHOLE), dict.fromkeys(links, 1.0))
        self._variable(1.0, rows.index(Of.STEP))
        self._variable(100 * horizon, rows.index(Of.MEMORY))
        self.parts: dict[tuple[int, str], int] = {}
        for number, family in enumerate(self.families):
            for part in layers.parts:
                self.parts[number, part] = self.highs.getNumCol()
                self._variable(0.0, rows.index(Of.CHAIN, family, part), {LAYERS + number: -1.0 * layers.times(part)})
        self.patterns_from = self.highs.getNumCol()

    def _row(self, least: float, most: float, columns: Sequence[int], values: Sequence[float]) -> None:
        self.highs.addRow(least, most, len(columns), np.array(columns, dtype=np.int32), np.array(values, dtype=float))

    def _variable(self, price: float, rows: Sequence[int], more: dict[int, float] | None = None) -> None:
        entries = {self.first + row: 1.0 for row in rows} | (more or {})
        index, values = np.array(list(entries), dtype=np.int32), np.array(list(entries.values()), dtype=float)
        self.highs.addCol(price, 0.0, self.infinity, len(index), index, values)

    def add(self, patterns: IntArray) -> None:
        """Allow more patterns, in the last layer and in the others."""
        new = np.setdiff1d(patterns, self.used)
        if not len(new):
            return
        part = self.rows.of(self.rows.patterns.subset(new))
        rows = np.arange(self.first, self.first + len(part.rows))
        every, last = part.values
        for column in range(len(new)):
            for layer, values in enumerate((every, last)):
                index = np.append(rows, layer).astype(np.int32)
                self.highs.addCol(0.0, 0.0, 1e30, len(index), index, np.append(-values[:, column], 1.0))
        self.used = np.concatenate([self.used, new])
        self.part = self.rows.of(self.rows.patterns.subset(self.used))

    def extend(self, chains: Sequence[Chain]) -> None:
        """More rows, which `rows` has already."""
        self.part.extend(chains)
        columns = np.arange(self.patterns_from, self.highs.getNumCol()).tolist()
        for row, chain in zip(self.part.rows[-len(chains) :], chains, strict=True):
            part = self.parts[self.families.index(chain.family), chain.part]
            values = -np.stack([row.every, row.last]).T.ravel()
            self._row(row.constant, self.infinity, [part, *columns], [1.0, *values.tolist()])

    def solve(self) -> tuple[float, FloatArray]:
        """Value without what follows compute, and row weights that prove a bound."""
        self.highs.run()
        duals = np.maximum(np.array(self.highs.getSolution().row_dual), 0.0)
        weights = duals[self.first :].copy()
        whole, links = self.rows.index(Of.WHOLE), duals[LAYERS : self.first]
        total = weights[whole].sum() + links.sum()
        if total > 0:
            weights[whole], links = weights[whole] / total, links / total
        else:
            weights[whole[0]] = 1.0
        _scale(weights, self.rows.index(Of.STEP), 1.0)
        for number, family in enumerate(self.families):
            for part in self.rows.layers.parts:
                index = self.rows.index(Of.CHAIN, family, part)
                _scale(weights, index, float(links[number]) * self.rows.layers.times(part))
        return float(self.highs.getInfo().objective_function_value), weights

    def mixture(self) -> tuple[IntArray, FloatArray]:
        """Patterns in use, and for how many layers."""
        every, last = self.mixture_weights()
        weights = every + last
        return self.used[weights > 0], weights[weights > 0]

    def mixture_weights(self) -> tuple[FloatArray, FloatArray]:
        """[used patterns] layers but the last, and the last one."""
        values = np.array(self.highs.getSolution().col_value)[self.patterns_from :]
        values = np.where(values > 1e-6, values, 0.0)
        return values[::2], values[1::2]


def _scale(weights: FloatArray, rows: list[int], to: float) -> None:
    """Let the weights of some rows add up `to` this, in place."""
    if not rows:
        return
    total = float(weights[rows].sum())
    if total > 0:
        weights[rows] *= to / total
    else:
        weights[rows[0]] = to
