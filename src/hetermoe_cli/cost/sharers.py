"""Sharers: among how many ranks of several groups the states of every parameter are shared out."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.spec.layout import Layout


class Sharers(NamedTuple):
    """How many ranks of all groups share out optimizer states of the dense part, where these alone are sharded, and of
    every expert [layers, experts]; nobody with others where one group does not share out any."""

    attending: int
    experts: NDArray[np.int64]

    @classmethod
    def of(cls, groups: Iterable[tuple[Layout, int]]) -> "Sharers":
        """Of layouts with the number of groups that run each."""
        groups = list(groups)
        shared = all(layout.schedule.shares_states for layout, _ in groups)
        attending, counts = 0, []
        for layout, copies in groups:
            attending += copies * len(layout.attending)
            held = np.full((layout.layers, layout.experts), copies)
            for layer, placement in enumerate(layout.placement):
                held[layer, placement.replicated] *= len(layout.attending)
            counts.append(held)
        held = np.sum(counts, axis=0)
        return cls(attending, held) if shared else cls(1, np.ones_like(held))
