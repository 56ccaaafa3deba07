"""How a pipeline's layers are split over its stages, and its micro-batches over pipelines."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from math import floor, inf
from typing import NamedTuple

from hetermoe_cli.spec.train import Recompute


class Way(NamedTuple):
    """A stage with one kind of recomputation: seconds of a layer, of what else it has, and most layers that fit."""

    recompute: Recompute
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
    """What a stage gets."""

    layers: int
    way: Way

    @property
    def seconds(self) -> float:
        """Of a micro-batch."""
        return self.way.seconds(self.layers)


def useful(ways: Iterable[Way]) -> list[Way]:
    """Those that hold more layers than every faster one."""
    result: list[Way] = []
    for way in sorted(ways, key=lambda way: (way.layer, way.extra)):
        if not result or way.most > result[-1].most:
            result.append(way)
    return result


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
    first = bisect_left(limits, True, key=lambda limit: _holds(layers, _room(stages, limit)))
    fastest = sorted(range(len(stages)), key=lambda stage: min(way.layer for way in stages[stage]))
    best: list[Held] | None = None
    value = inf
    for limit in limits[first:]:
        if (micro_batches - 1) * limit >= value:
            break
        room = _room(stages, limit)
        share, left = [1] * len(room), layers - len(room)
        for stage in fastest:
            added = min(left, room[stage] - 1)
            share[stage] += added
            left -= added
        held = [_fastest(ways, count) for ways, count in zip(stages, share, strict=True)]
        times = [one.seconds for one in held]
        found = sum(times) + (micro_batches - 1) * max(times)
        if found < value:
            best, value = held, found
    return best


def _room(stages: Sequence[Sequence[Way]], limit: float) -> list[int]:
    return [max([way.room(limit) for way in ways]) for ways in stages]


def _holds(layers: int, room: Sequence[int]) -> bool:
    return min(room) > 0 and sum(room) >= layers


def _fastest(ways: Sequence[Way], layers: int) -> Held:
    return min((Held(layers, way) for way in ways if way.most >= layers), key=lambda held: held.seconds)


def deal(total: int, seconds: Sequence[Sequence[float]]) -> list[int]:
    """Micro-batches per pipeline, at least one: each goes where it would end first."""
    counts = [1] * len(seconds)
    ends = [(sum(times), max(times)) for times in seconds]
    for _ in range(total - len(seconds)):
        first = min(range(len(counts)), key=lambda index: ends[index][0] + counts[index] * ends[index][1])
        counts[first] += 1
    return counts
