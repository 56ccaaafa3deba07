"""How far measured values differ; without torch, so that whoever asks need not load it."""

import statistics
from collections.abc import Sequence


def relative_spread(values: Sequence[float]) -> float:
    """(75th - 25th percentile) / median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle
