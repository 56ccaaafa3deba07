"""Sharers: among how many ranks of several groups the states of every parameter are shared out."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.spec.layout import Layout, Span


class Sharers(NamedTuple):
    """How many ranks of all groups share out optimizer states of every layer's dense part and of the head's
    [layers + 1], where these alone are sharded, and of every expert [layers, experts]; nobody with others where one
    group does not share out any."""

    dense: NDArray[np.int64]
    experts: NDArray[np.int64]

    @classmethod
    def of(cls, groups: Iterable[tuple[Layout, int]]) -> "Sharers":
        """Of layouts with the number of groups that run each."""
        groups = list(groups)
        shared = all(layout.schedule.shares_states for layout, _ in groups)
        attending, counts = [], []
        for layout, copies in groups:
            own = [len(layout.attending_at(layer)) for layer in range(layout.layers + 1)]
            attending.append(copies * np.array(own))
            held = np.full((layout.layers, layout.experts), copies)
            for layer, placement in enumerate(layout.placement):
                held[layer, placement.replicated] *= own[layer]
            counts.append(held)
        dense, held = np.sum(attending, axis=0), np.sum(counts, axis=0)
        return cls(dense, held) if shared else cls(np.ones_like(dense), np.ones_like(held))

    def share(self, cost: CostModel, span: Span, dense: int) -> float:
        """Of a pipeline stage's `dense` parameters, those that each of its attending ranks has."""
        counts = self.dense[span.first : span.end + span.has_head]
        if (counts == counts[0]).all():
            return dense / int(counts[0])
        return float(sum(cost.segment_parameters(span.first + i) / int(count) for i, count in enumerate(counts)))
