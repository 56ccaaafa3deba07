"""Dealt: experts shared out by tables [layers, classes] in an otherwise fixed layout, and climbs by replays.

For layouts that the search's task graphs do not know (shifts, heads apart): a replay takes longer but covers all.
"""

import time
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, count, product
from math import inf
from typing import NamedTuple

import numpy as np

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.arrays import IntArray
from hetermoe_cli.planner.instance.deal import number, rotate
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import Layout

STRIDES = (1, 2, 4)  # a move goes over every layer, every second, every fourth, and over one


class Climbed(NamedTuple):
    """A table and the seconds of its replay."""

    seconds: float
    table: IntArray


class Dealt:
    """`base` with other placements: `classes` are ranks that share out evenly what a table gives them together; copies
    of experts stay."""

    def __init__(self, cost: CostModel, base: Layout, classes: Sequence[tuple[int, ...]]) -> None:
        self.cost, self.base, self.classes = cost, base, classes

    @property
    def table(self) -> IntArray:
        """That of the base, whose classes may share it out otherwise."""
        return np.array(
            [
                [sum(len(placement.experts[rank]) for rank in ranks) for ranks in self.classes]
                for placement in self.base.placement
            ]
        )

    def layout(self, table: IntArray) -> Layout:
        """The layout of a table."""
        counts = np.zeros((len(table), self.base.world_size), dtype=int)
        for totals, ranks in zip(table.T, self.classes, strict=True):
            counts[:, list(ranks)] = rotate([int(total) for total in totals], len(ranks))
        copies = [len(placement.replicated) for placement in self.base.placement]
        pairs = zip(counts, copies, strict=True)
        placement = [number([int(count) for count in layer], replicated) for layer, replicated in pairs]
        return self.base.model_copy(update={"placement": placement})

    def replayed(self, table: IntArray) -> Climbed:
        """A table with its seconds; infinite if it does not fit."""
        layout = LayoutCost(self.cost, self.layout(table))
        return Climbed(inf if overflow(layout) else simulate(layout).seconds, table)

    def climbed(self, start: Climbed, deadline: float) -> Climbed:
        """After moves of experts from class to class, each of which helps, in random order."""
        best, moves, draw, failed = start, self._moves, np.random.default_rng(0), 0
        for move in chain.from_iterable(draw.permutation(len(moves)) for _ in (count() if moves else ())):
            if failed >= len(moves) or time.monotonic() > deadline:
                break
            moved = best.table + moves[move]
            failed += 1
            if (moved >= 0).all() and (found := self.replayed(moved)).seconds < best.seconds:
                best, failed = found, 0
        return best

    @cached_property
    def _moves(self) -> list[IntArray]:
        """One expert from a class to another in some layers."""
        layers = self.base.layers
        blocks = {tuple(range(first, layers, stride)) for stride in STRIDES for first in range(stride)}
        blocks |= {(layer,) for layer in range(layers)}
        classes, moves = range(len(self.classes)), []
        for block, giver, taker in product(sorted(blocks), classes, classes):
            if giver != taker and block:
                move = np.zeros((layers, len(classes)), dtype=int)
                move[list(block), giver], move[list(block), taker] = -1, 1
                moves.append(move)
        return moves
