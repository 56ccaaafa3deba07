"""Load: who sends how many rows to which expert, assumed or recorded."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

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
    experts = cost.model.experts
    return _Sent(layout, lambda count: np.full(experts, cost.rows_per_expert(count)))


class AssumedLoad:
    """The inputs' expert load: every rank's rows spread by the same shares, in every micro-batch."""

    def __init__(self, shares: NDArray[np.float64], cost: CostModel, layout: Layout) -> None:
        experts = cost.model.experts
        self._shares = shares
        self._rows = _Sent(layout, lambda count: np.float64(cost.rows_per_expert(count) * experts))

    def __call__(self, layer: int, micro_batch: int) -> Matrix:
        return np.outer(self._rows(layer, micro_batch), self._shares[layer])


class _Sent:
    """What every rank sends of a layer and micro-batch, stacked: `of` its sequences, which those of other pipeline
    stages have none of, nor those that are not on shift."""

    def __init__(self, layout: Layout, of: Callable[[int], Any]) -> None:
        self._layout, self._of = layout, of
        self._known: dict[tuple[int, int], Matrix] = {}

    def __call__(self, layer: int, micro_batch: int) -> Matrix:
        layout = self._layout
        key = layout.span_at(layer).number, micro_batch if layout.shifts else 0
        if key not in self._known:
            crew = frozenset(layout.crew(layer, micro_batch))
            counts = [count if rank in crew else 0 for rank, count in enumerate(layout.sequences_per_rank)]
            self._known[key] = np.array([self._of(count) for count in counts])
        return self._known[key]


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
