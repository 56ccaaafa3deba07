"""Refit: predicted against measured seconds of a run's tasks -> a kernel table that has what was measured. No torch.

A fit is robust: the median over tasks of measured / predicted, weighted by the predicted seconds, so that a task that
waited for a core, or a tiny one, moves nothing. Where the tasks of one kind differ in size by a factor of 2, every
point of the table that they lie nearest to (in the logarithm of the size) gets the ratio of its own tasks; points
between them are interpolated, points beyond follow the last one.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from statistics import median
from typing import NamedTuple, TypeVar

import numpy as np

from hetermoe_cli.profiler.tables import rounded
from hetermoe_cli.spec.profile import AttentionPoint, ExpertPoint, HeadPoint, KernelTable

ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention forward", "attention backward"
EXPERT_FORWARD, EXPERT_BACKWARD = "expert forward", "expert backward"
HEAD, OPTIMIZER = "head", "optimizer"
KINDS = (ATTENTION_FORWARD, ATTENTION_BACKWARD, EXPERT_FORWARD, EXPERT_BACKWARD, HEAD, OPTIMIZER)

_SIZES_DIFFER = 2.0  # largest over smallest size, from which sizes get ratios of their own
# What must lie nearest to a point for a ratio of its own: so many tasks, with such a share of the predicted seconds.
_FEWEST_TASKS = 8
_SMALLEST_SHARE = 0.05

PointT = TypeVar("PointT", AttentionPoint, ExpertPoint, HeadPoint)


class Sample(NamedTuple):
    """One task that ran.

    `size`: sequences of attention (documents, where it stays inside), rows per expert, tokens of the head, parameters
    of the optimizer.
    """

    size: float
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted seconds."""
        return self.measured / self.predicted


@dataclass(frozen=True)
class Fit:
    """Ratio of one kind of task; `spread` is (75th - 25th percentile) / median over the tasks' ratios.

    `knots`: (size of a table's point, ratio of the tasks nearest to it), by size; none where one ratio serves all.
    """

    tasks: int
    ratio: float
    spread: float
    sizes: tuple[float, float]
    knots: tuple[tuple[float, float], ...] = ()

    def at(self, size: float) -> float:
        """Ratio for a table's point of this size."""
        if not self.knots:
            return self.ratio
        sizes, ratios = zip(*self.knots, strict=True)
        return float(np.interp(log(size), np.log(sizes), ratios))


def fit(samples: Sequence[Sample], points: Sequence[float] = ()) -> Fit | None:
    """Fit the tasks of one kind; `points`: sizes that the table has. None if no task has a positive ratio to tell."""
    timed = [sample for sample in samples if sample.predicted > 0]
    if not timed:
        return None
    low, middle, high = _quartiles(timed)
    if middle <= 0:
        return None
    sizes = [sample.size for sample in timed]
    return Fit(len(timed), middle, (high - low) / middle, (min(sizes), max(sizes)), _knots(timed, points))


def _quartiles(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """25th, 50th and 75th percentile of the ratios, weighted by predicted seconds."""
    ratios = np.array([sample.ratio for sample in samples])
    weights = np.array([sample.predicted for sample in samples])
    order = np.argsort(ratios)
    shares = np.cumsum(weights[order]) / weights.sum()
    low, middle, high = ratios[order][np.minimum(np.searchsorted(shares, (0.25, 0.5, 0.75)), len(order) - 1)].tolist()
    return low, middle, high


def _knots(samples: Sequence[Sample], points: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Points with enough next to them and positive ratios; none if their tasks' sizes are much the same."""
    near: dict[float, list[Sample]] = defaultdict(list)
    for sample in samples:
        if points and sample.size > 0:
            near[min(points, key=lambda point: abs(log(point / sample.size)))].append(sample)
    least = _SMALLEST_SHARE * sum(sample.predicted for sample in samples)
    groups = {
        point: group
        for point, group in sorted(near.items())
        if len(group) >= _FEWEST_TASKS and sum(sample.predicted for sample in group) >= least
    }
    ratios = {point: _quartiles(group)[1] for point, group in groups.items()}
    sizes = [median(sample.size for sample in groups[point]) for point, ratio in ratios.items() if ratio > 0]
    if not sizes or max(sizes) < _SIZES_DIFFER * min(sizes):
        return ()
    return tuple((point, ratio) for point, ratio in ratios.items() if ratio > 0)


def refit(table: KernelTable, fits: Mapping[str, Fit]) -> KernelTable:
    """`table` with the seconds of every point times the ratio at its size; kinds without a fit are left as they are."""
    optimizer = fits[OPTIMIZER].ratio if OPTIMIZER in fits else 1.0
    attention = (fits.get(ATTENTION_FORWARD), fits.get(ATTENTION_BACKWARD))
    expert = (fits.get(EXPERT_FORWARD), fits.get(EXPERT_BACKWARD))
    head = (fits.get(HEAD), fits.get(HEAD))  # its forward and backward are one task
    return table.model_copy(
        update={
            "attention": [_scaled(point, point.sequences, *attention) for point in table.attention],
            "dense": [_scaled(point, point.sequences, *attention) for point in table.dense],  # timed within attention
            "expert": [_scaled(point, point.tokens, *expert) for point in table.expert],
            "head": [_scaled(point, point.tokens, *head) for point in table.head],
            "optimizer_seconds_per_parameter": rounded(table.optimizer_seconds_per_parameter * optimizer),
        }
    )


def _scaled(point: PointT, size: float, forward: Fit | None, backward: Fit | None) -> PointT:
    found = [one.spread for one in (forward, backward) if one]
    if not found:
        return point
    return point.model_copy(
        update={
            "forward_seconds": rounded(point.forward_seconds * (forward.at(size) if forward else 1.0)),
            "backward_seconds": rounded(point.backward_seconds * (backward.at(size) if backward else 1.0)),
            "spread": round(max(found), 4),
        }
    )


def point_sizes(table: KernelTable, kind: str) -> list[float]:
    """Sizes at which `table` has points for this kind of task, ascending; none for the optimizer."""
    if kind in (ATTENTION_FORWARD, ATTENTION_BACKWARD):
        return sorted({float(point.sequences) for point in table.attention})
    if kind in (EXPERT_FORWARD, EXPERT_BACKWARD):
        return [float(point.tokens) for point in table.expert]
    return [float(point.tokens) for point in table.head] if kind == HEAD else []
