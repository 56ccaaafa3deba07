"""How a pipeline's layers are split over its stages, and its micro-batches over pipelines."""

from collections.abc import Sequence
from math import floor, inf
from typing import NamedTuple


class Way(NamedTuple):
    """A stage with one kind of recomputation: seconds of a layer, of what else it has, and most layers that fit."""

    layer: float
    extra: float
    most: int

    def seconds(self, layers: int) -> float:
        """Of a micro-batch."""
        return self.layer * layers + self.extra

    def room(self, limit: float) -> int:
        """Layers that fit into memory and into `limit` seconds."""
        return min(self.most, floor((limit - self.extra) / self.layer + 1e-9))


class Held(NamedTuple):
    """What a stage gets: layers, and which of its ways."""

    layers: int
    way: int


def split(layers: int, stages: Sequence[Sequence[Way]], micro_batches: int) -> list[Held] | None:
    """What every stage holds for the least sum of stages + (micro_batches - 1) x the slowest stage; None if nothing
    fits.

    At least one layer a stage. For every time that the slowest stage may take, the fastest stages are filled first, and
    take the fastest of their ways that has room for what they got; which gives the least sum where all have one way.
    """
    most = [max(way.most for way in ways) for ways in stages]
    if min(most) < 1 or sum(most) < layers or len(stages) > layers:
        return None
    limits = sorted({way.seconds(n) for ways in stages for way in ways for n in range(1, way.most + 1)})
    fastest = sorted(range(len(stages)), key=lambda stage: min(way.layer for way in stages[stage]))
    best: list[Held] | None = None
    value = inf
    for limit in limits:
        if (micro_batches - 1) * limit >= value:
            break
        room = [max(way.room(limit) for way in ways) for ways in stages]
        if min(room) < 1 or sum(room) < layers:
            continue
        share, left = [1] * len(room), layers - len(room)
        for stage in fastest:
            added = min(left, room[stage] - 1)
            share[stage] += added
            left -= added
        held = [_fastest(ways, count) for ways, count in zip(stages, share, strict=True)]
        times = [ways[one.way].seconds(one.layers) for ways, one in zip(stages, held, strict=True)]
        found = sum(times) + (micro_batches - 1) * max(times)
        if found < value:
            best, value = held, found
    return best


def _fastest(ways: Sequence[Way], layers: int) -> Held:
    fitting = [number for number, way in enumerate(ways) if way.most >= layers]
    return Held(layers, min(fitting, key=lambda number: ways[number].seconds(layers)))


def deal(total: int, seconds: Sequence[Sequence[float]]) -> list[int]:
    """Micro-batches per pipeline, at least one: each goes where it would end first."""
    counts = [1] * len(seconds)
    ends = [(sum(times), max(times)) for times in seconds]
    for _ in range(total - len(seconds)):
        first = min(range(len(counts)), key=lambda index: ends[index][0] + counts[index] * ends[index][1])
        counts[first] += 1
    return counts
