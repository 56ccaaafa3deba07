"""Load: who sends how many rows to which expert, assumed or recorded."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.ports import Matrix
from hetermoe_cli.spec.layout import Layout


class Load(Protocol):
    """Who sends how many rows to which expert."""

    def __call__(self, layer: int, micro_batch: int) -> Matrix:
        """rows [world, experts]: rows of rank r's tokens for expert e (nominal, may be fractional)."""
        ...


def balanced_load(cost: CostModel, layout: Layout) -> Load:
    """Every expert gets the same share of every rank's rows."""
    found = [
        np.repeat([[cost.rows_per_expert(count)] for count in counts], cost.model.experts, axis=1)
        for counts in _sequences(layout)
    ]
    return lambda layer, micro_batch: found[layout.span_at(layer).number]


class AssumedLoad:
    """The inputs' expert load: every rank's rows spread by the same shares, in every micro-batch."""

    def __init__(self, shares: NDArray[np.float64], cost: CostModel, layout: Layout) -> None:
        experts = cost.model.experts
        self._shares, self._layout = shares, layout
        self._rows = [np.array([cost.rows_per_expert(c) * experts for c in counts]) for counts in _sequences(layout)]

    def __call__(self, layer: int, micro_batch: int) -> Matrix:
        return np.outer(self._rows[self._layout.span_at(layer).number], self._shares[layer])


def _sequences(layout: Layout) -> list[list[int]]:
    """By pipeline stage, the sequences of every rank: those of other stages send no rows."""
    if not layout.pipeline:
        return [layout.sequences_per_rank]
    attending = [frozenset(span.attending) for span in layout.spans]
    return [
        [count if rank in ranks else 0 for rank, count in enumerate(layout.sequences_per_rank)] for ranks in attending
    ]


class RecordedLoad:
    """Counts recorded in a run, [world, layers, micro-batches, experts], scaled to nominal rows."""

    def __init__(self, counts: NDArray[np.integer], scale: float) -> None:
        self._counts, self._scale = counts, scale

    def __call__(self, layer: int, micro_batch: int) -> Matrix:
        scaled: Matrix = self._counts[:, layer, micro_batch, :].astype(np.float64) * self._scale
        return scaled


class CountedLoad(NamedTuple):
    """A load of which it is also known how many rows go to each rank where they go once per device."""

    by_expert: Load
    by_rank: Load  # rows [world, world]

    def __call__(self, layer: int, micro_batch: int) -> Matrix:
        """rows [world, experts]."""
        return self.by_expert(layer, micro_batch)
