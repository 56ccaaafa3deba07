"""Heads apart: norm, head and loss on devices that have time for them, old ones too.

A head is one large matrix product, at which old devices are as good as at experts, but it belongs to ranks that
attend. At long sequences, or with a large vocabulary, these are busy all the time while hosts wait. Here every
micro-batch's tokens are shared out for the head: over all devices as fast as they compute it, over hosts alone, and
half way to either; the best share that fits is then moved from class to class in small steps, and experts are with it.
No bound covers these layouts.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import inf

import numpy as np

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.arrays import FloatArray
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.planner.search.dealt import Climbed, Dealt
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import Layout

MOST_DEVICES = 16  # beyond that replays are too slow to climb by
BASES = 6
CLIMBED = 3
WORTH = 0.99  # times the best: what perfectly divisible work must be below, as replays are above it
NEAR = 1.01  # times the best: from further off a climb seldom gets below it
PARTS = 1 << 12  # that a micro-batch's tokens are cut into
STEPS = (0.1, 0.05, 0.02)  # of all tokens, that a climb moves to another class


def with_heads(cost: CostModel, bases: Sequence[Layout], seconds: float, allowed: float) -> Iterator[Layout]:
    """Layouts with the head apart that may beat `seconds`, found in about `allowed` seconds; `bases`: those without,
    fastest first."""
    if len(cost.devices) > MOST_DEVICES:
        return
    began = time.monotonic()
    starts: list[tuple[float, Layout]] = []
    for base in bases[:BASES]:
        if time.monotonic() > began + allowed / 4:
            break
        if base.allows_head and (shares := _Shares(cost, base)).least < WORTH * seconds:
            starts += [(_seconds(cost, layout), layout) for layout in shares.starts()]
    for took, layout in sorted(starts, key=lambda pair: pair[0])[:CLIMBED]:
        if took < NEAR * seconds:
            yield _climbed(cost, layout, took, began + allowed)


def _seconds(cost: CostModel, layout: Layout) -> float:
    """Of its replay; infinite if it does not fit."""
    found = LayoutCost(cost, layout)
    return inf if overflow(found) else simulate(found).seconds


class _Shares:
    """Who could compute how much of a base's head."""

    def __init__(self, cost: CostModel, base: Layout) -> None:
        self._base, replay = base, LayoutCost(cost, base)
        trace, world = simulate(replay), base.world_size
        tokens = base.sequences_per_micro_batch * cost.train.sequence_length
        whole = {name: sum(device.head(tokens)[:2]) for name, device in cost.types.items()}
        self._whole = base.micro_batches * np.array([whole[device.type] for device in cost.devices])
        self._own = np.array([base.head_share(rank) * base.on_shift(rank) for rank in range(world)])
        self._own /= self._own.sum()
        self._busy = trace.seconds * np.array(trace.busy_share(world)) - self._own * self._whole
        self._hosts = np.array(base.sequences_per_rank) == 0

    @property
    def least(self) -> float:
        """Seconds in which all are done if only compute counted and the head could be cut at will."""
        low, high = float(self._busy.max()), float(self._busy.max() + self._whole.max())
        for _ in range(30):
            middle = (low + high) / 2
            enough = (np.maximum(0.0, middle - self._busy) / self._whole).sum() >= 1
            low, high = (low, middle) if enough else (middle, high)
        return high

    def starts(self) -> Iterator[Layout]:
        """The base with some shares."""
        speeds = 1 / self._whole
        for target in (speeds, speeds * self._hosts):
            for part in (0.5, 1.0) if target.any() else ():
                yield shared(self._base, (1 - part) * self._own + part * target / target.sum())


def shared(base: Layout, shares: FloatArray) -> Layout:
    """The base with the head so shared out over its ranks."""
    return base.model_copy(update={"head": np.rint(PARTS * shares / shares.sum()).astype(int).tolist()})


def _climbed(cost: CostModel, layout: Layout, seconds: float, deadline: float) -> Layout:
    """After moves of experts, and of shares of the head, that help."""
    classes = _classes(cost, layout)
    best = Dealt(cost, layout, classes)
    at = min(Climbed(seconds, best.table), best.replayed(best.table), key=lambda found: found.seconds)
    while time.monotonic() < deadline:
        before = at.seconds
        at = best.climbed(at, deadline)
        for moved in _moved(best.base, classes):
            if time.monotonic() > deadline:
                break
            other = Dealt(cost, moved, classes)
            if (found := other.replayed(at.table)).seconds < at.seconds:
                best, at = other, found
                break
        if at.seconds == before:
            break
    return best.layout(at.table)


def _classes(cost: CostModel, layout: Layout) -> list[tuple[int, ...]]:
    """Ranks of one device type that attend to as much and have as much of the head."""
    found: dict[object, list[int]] = defaultdict(list)
    for rank, device in enumerate(cost.devices):
        sequences = layout.sequences_per_rank[rank]
        found[device.type, sequences, layout.on_shift(rank) * bool(sequences), layout.head[rank]].append(rank)
    return [tuple(ranks) for ranks in found.values()]


def _moved(base: Layout, classes: Sequence[tuple[int, ...]]) -> Iterator[Layout]:
    """With some of the head given from one class to another."""
    shares = np.array(base.head) / sum(base.head)
    for step in STEPS:
        for giver in classes:
            for taker in classes:
                moved = shares.copy()
                moved[list(giver)] -= step / len(giver)
                moved[list(taker)] += step / len(taker)
                if giver != taker and (moved >= 0).all():
                    yield shared(base, moved)
