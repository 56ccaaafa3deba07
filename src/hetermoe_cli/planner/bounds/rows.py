"""Rows of the LP over patterns: what a variable is at least, as a constant and a sum over layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from hetermoe_cli.planner.arrays import FloatArray, largest
from hetermoe_cli.planner.bounds.chains import Chain, Family, Layers, Part
from hetermoe_cli.planner.bounds.patterns import Patterns
from hetermoe_cli.planner.bounds.sides import Side


class Of(IntEnum):
    """What a row bounds: the makespan without layer 0's all-reduce and what follows, a part of a family's chains, the
    optimizer step; or it says that a class's memory is no more than there is."""

    WHOLE = 0
    CHAIN = 1
    STEP = 2
    MEMORY = 3


@dataclass(frozen=True)
class Row:
    """constant + the sum of `every` over all layers but the last, and of `last` ([patterns])."""

    of: Of
    constant: float
    every: FloatArray
    last: FloatArray


class Rows:
    """All rows of some patterns: those of all chains so far come after those of the makespan, steps and memory."""

    def __init__(self, patterns: Patterns, chains: Sequence[Chain] = ()) -> None:
        self.patterns, self.rates = patterns, patterns.rates
        self.layers = Layers(Side(patterns, 0), Side(patterns, 1))
        classes = range(len(self.rates.classes))
        self.chains: list[Chain] = []
        self.rows = [self._reduces(), *self._streams(), *map(self._step, classes), *map(self._memory, classes)]
        self.fixed = len(self.rows)
        self.extend(chains)

    def of(self, patterns: Patterns) -> "Rows":
        """The same rows of other patterns."""
        return Rows(patterns, self.chains)

    def extend(self, chains: Sequence[Chain]) -> None:
        """Rows of more chains."""
        self.chains += chains
        self.rows += [self._chain(chain) for chain in chains]
        self.__dict__.pop("constants", None)

    @cached_property
    def constants(self) -> FloatArray:
        """[rows]."""
        return np.array([row.constant for row in self.rows])

    def index(self, of: Of, family: Family | None = None, part: Part | None = None) -> list[int]:
        """Numbers of the rows that bound one thing."""
        if of is not Of.CHAIN:
            return [number for number, row in enumerate(self.rows) if row.of is of]
        return [
            self.fixed + number
            for number, chain in enumerate(self.chains)
            if chain.family == family and chain.part == part
        ]

    def makespan(self, sums: FloatArray) -> FloatArray:
        """Of the rows' sums over all layers, [rows, ...]: the makespan, without what follows compute."""
        ways = [sums[self.index(Of.WHOLE)].max(0)]
        for family in self.layers.families:
            parts = [(part, self.index(Of.CHAIN, family, part)) for part in self.layers.parts]
            if all(index for _, index in parts):
                ways.append(sum(self.layers.times(part) * sums[index].max(0) for part, index in parts))
        return largest(ways)

    @cached_property
    def busiest(self) -> FloatArray:
        """[patterns] compute of the class that has most in a layer."""
        forward, backward = self.layers.forward, self.layers.backward
        return largest([*(forward.stream + backward.stream)])

    def weigh(self, weights: FloatArray, *, last: bool) -> FloatArray:
        """[patterns] weighted sum of the first rows."""
        result = np.zeros(len(self.patterns.replicated))
        for row, weight in zip(self.rows, weights.tolist(), strict=False):
            if weight > 0:
                result = result + weight * (row.last if last else row.every)
        return result

    @property
    def values(self) -> tuple[FloatArray, FloatArray]:
        """[rows, patterns] of any layer, and of the last."""
        return np.array([row.every for row in self.rows]), np.array([row.last for row in self.rows])

    def _chain(self, chain: Chain) -> Row:
        floor = -self.rates.serial  # where there is no way: so little that no such placement is bounded
        every, last = (np.maximum(part(self.layers), floor) for part in (chain.every, chain.last))
        return Row(Of.CHAIN, chain.constant(self.layers), every, last)

    def _reduces(self) -> Row:
        """All-reduces one after another, from the last head on."""
        schedule, rates = self.rates.choice.schedule, self.rates
        reduces, each = rates.reduces, rates.reduces[-2][1]
        start = 0.0
        for r, c in zip(rates.of, rates.classes, strict=True):
            if c.attends:
                both = schedule.micro_batches * r.attending(rates.layers)
                backward = rates.layers * r.attention[1] + r.dense[1] + (rates.layers > 1) * r.second
                start = max(start, both - schedule.window * backward)
        copies = np.asarray(each * self.patterns.replicated, dtype=np.float64)
        return Row(Of.WHOLE, start + sum(base for base, _ in reduces[1:]), copies, copies)

    def _streams(self) -> list[Row]:
        """Experts of classes that do not attend, between the first and the last attention of every window."""
        forward, backward, windows = self.layers.forward, self.layers.backward, self.layers.windows
        both = max(forward.first(a) + backward.first(a) for a in forward.attending)
        result = []
        for e in forward.hosting:
            stream = windows * (forward.stream[e] + backward.stream[e])
            result.append(Row(Of.WHOLE, windows * both, stream, stream))
        return result

    def _step(self, c: int) -> Row:
        r, p = self.rates.of[c], self.patterns
        held = np.asarray(r.optimizer_per_expert * p.mean[c] + r.optimizer_per_copy * p.replicated, dtype=np.float64)
        return Row(Of.STEP, r.optimizer_base, held, held)

    def _memory(self, c: int) -> Row:
        r, attends, p = self.rates.of[c], self.rates.classes[c].attends, self.patterns
        each = r.memory_per_hosted + r.memory_per_share / self.rates.layers
        copies = p.replicated * (attends * (r.memory_per_replicated + r.memory_per_copy / self.rates.layers))
        used = np.asarray((p.mean[c] * each + copies) / r.memory_limit, dtype=np.float64)
        return Row(Of.MEMORY, r.memory_base / r.memory_limit - 1, used, used)
