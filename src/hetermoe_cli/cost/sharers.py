"""Sharers: among how many ranks of several groups the states of every parameter are shared out."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.spec.layout import Layout


class Sharers(NamedTuple):
    """How many ranks of all groups hold the dense part, and every expert [layers, experts]."""

    attending: int
    experts: NDArray[np.int64]

    @classmethod
    def of(cls, groups: Iterable[tuple[Layout, int]]) -> "Sharers":
        """Of layouts with the number of groups that run each."""
        attending, counts = 0, []
        for layout, copies in groups:
            attending += copies * len(layout.attending)
            held = np.full((layout.layers, layout.experts), copies)
            for layer, placement in enumerate(layout.placement):
                held[layer, placement.replicated] *= len(layout.attending)
            counts.append(held)
        return cls(attending, np.sum(counts, axis=0))
