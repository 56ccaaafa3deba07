"""Array types of the planner, and numpy calls whose results numpy itself leaves untyped."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def largest(ways: Sequence[FloatArray]) -> FloatArray:
    """Element by element the largest of arrays of one shape."""
    result: FloatArray = np.maximum.reduce(ways)
    return result


def anywhere(condition: BoolArray) -> BoolArray:
    """[...] whether the condition holds anywhere along the first axis."""
    result: BoolArray = np.any(condition, axis=0)
    return result


def choose(condition: BoolArray, yes: FloatArray | float, no: FloatArray | float) -> FloatArray:
    """`yes` where the condition holds, else `no`."""
    result: FloatArray = np.where(condition, yes, no)
    return result
