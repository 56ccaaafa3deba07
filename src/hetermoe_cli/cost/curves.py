"""Kernel curves: profile points -> seconds and saved bytes at any size."""

from bisect import bisect_left
from collections.abc import Sequence
from copy import copy
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.profile import AttentionPoint, Timing

FloatArray = NDArray[np.float64]


class Cost(NamedTuple):
    """Seconds forward and backward, and the bytes kept between them."""

    forward: float
    backward: float
    saved_bytes: float


class Curve:
    """Monotone piecewise-linear curve through measured sizes.

    Below the first size it follows the first segment (never below zero, and zero rows cost nothing), above the last
    one the last segment; `covers` tells whether a size lies inside the measured range.
    """

    def __init__(self, sizes: Sequence[float], points: Sequence[Timing]) -> None:
        self.sizes = list(sizes)
        columns = zip(*[(p.forward_seconds, p.backward_seconds, float(p.saved_bytes)) for p in points], strict=True)
        self._columns = [list(accumulate(column, max)) for column in columns]  # noise must not make more work cheaper
        self._known: dict[float, Cost] = {}  # a search asks for few sizes, again and again

    def covers(self, size: float) -> bool:
        """Whether `size` is interpolated rather than extended."""
        return self.sizes[0] <= size <= self.sizes[-1]

    def __call__(self, size: float) -> Cost:
        found = self._known.get(size)
        if found is None:
            found = self._known[size] = self._at(size)
        return found

    def _at(self, size: float) -> Cost:
        if size <= 0:
            return Cost(0.0, 0.0, 0.0)
        if len(self.sizes) == 1:
            return Cost(*(column[0] * size / self.sizes[0] for column in self._columns))
        index = min(max(bisect_left(self.sizes, size), 1), len(self.sizes) - 1)
        low, high = self.sizes[index - 1], self.sizes[index]
        share = (size - low) / (high - low)
        forward, backward, saved = (c[index - 1] + share * (c[index] - c[index - 1]) for c in self._columns)
        return Cost(max(forward, 0.0), max(backward, 0.0), max(saved, 0.0))

    def seconds(self, sizes: FloatArray) -> tuple[FloatArray, FloatArray]:
        """[n] forward and backward seconds of n sizes."""
        if len(self.sizes) == 1:
            forward, backward = (column[0] * np.maximum(sizes, 0.0) / self.sizes[0] for column in self._columns[:2])
            return forward, backward
        index = np.searchsorted(self.sizes, sizes).clip(1, len(self.sizes) - 1)
        low, high = np.array(self.sizes)[index - 1], np.array(self.sizes)[index]
        share = (sizes - low) / (high - low)
        lower, upper = np.array(self._columns[:2])[:, index - 1], np.array(self._columns[:2])[:, index]
        forward, backward = np.where(sizes > 0, np.maximum(lower + share * (upper - lower), 0.0), 0.0)
        return forward, backward

    def slowed(self, factor: float) -> "Curve":
        """The same with all seconds multiplied."""
        result = copy(self)
        result._known = {}
        forward, backward, saved = self._columns
        result._columns = [[factor * value for value in forward], [factor * value for value in backward], saved]
        return result


class AttentionCurve:
    """Cost over the number of sequences, each of `documents` (may be fractional) documents of `length` tokens.

    `source` names profile and field in errors. What a profile measures as a sequence is the cost of one document:
    attention ends there, all else goes by tokens. Between two profiled lengths the time per token is interpolated
    linearly: exact for a + b * length per token.
    """

    def __init__(self, points: Sequence[AttentionPoint], length: int, source: str, documents: float = 1.0) -> None:
        by_length: dict[int, list[AttentionPoint]] = {}
        for point in points:
            by_length.setdefault(point.sequence_length, []).append(point)
        lengths = sorted(by_length)
        if not lengths[0] <= length <= lengths[-1]:
            raise UserError(
                f"{source}: sequence length {length} is outside the profiled "
                f"{lengths[0]}..{lengths[-1]}: profile it with --sequence-lengths {length}"
            )
        upper = lengths[bisect_left(lengths, length)]
        lower = upper if upper == length else lengths[bisect_left(lengths, length) - 1]
        self._curves = [(near, _curve(by_length[near])) for near in (lower, upper)]
        self._share = 0.0 if upper == lower else (length - lower) / (upper - lower)
        self._length, self._documents = length, documents
        self._known: dict[float, Cost] = {}

    def covers(self, sequences: float) -> bool:
        """Whether `sequences` is interpolated rather than extended."""
        return all(curve.covers(sequences * self._documents) for _, curve in self._curves)

    def __call__(self, sequences: float) -> Cost:
        found = self._known.get(sequences)
        if found is None:
            found = self._known[sequences] = self._at(sequences)
        return found

    def _at(self, sequences: float) -> Cost:
        (low, below), (high, above) = self._curves
        count = sequences * self._documents
        first, second = below(count), above(count)
        return Cost(
            *(
                self._length * ((1 - self._share) * a / low + self._share * b / high)
                for a, b in zip(first, second, strict=True)
            )
        )

    def slowed(self, factor: float) -> "AttentionCurve":
        """The same with all seconds multiplied."""
        result = copy(self)
        result._known = {}
        result._curves = [(length, curve.slowed(factor)) for length, curve in self._curves]
        return result


def _curve(points: Sequence[AttentionPoint]) -> Curve:
    return Curve([p.sequences for p in points], points)
