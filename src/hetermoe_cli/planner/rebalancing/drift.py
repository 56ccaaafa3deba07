"""Drift: by how much a run's expert load and its devices' speeds depart from what its placement was solved for."""

from collections.abc import Sequence

import numpy as np

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.measured import MeasuredState
from hetermoe_cli.planner.arrays import FloatArray
from hetermoe_cli.planner.cluster.replayed import Replayed, replay_measured
from hetermoe_cli.spec.base import NonNegativeInt, PositiveFloat, Spec
from hetermoe_cli.spec.plan import Group, Plan

TOLERANCE = 1.25  # factors up to here, or down to its inverse, are no departure
LEAST_FACTOR = 0.01  # reported: of a rank that gets no row any more, or is faster than its profile beyond belief
NAMED = 3  # ranks in a message


class Departure(Spec):
    """A rank's rows or seconds over those assumed. `layer`: where its rows depart most; null for its speed. `group`:
    which of the plan's several groups it is in; null where there is one."""

    rank: NonNegativeInt
    group: NonNegativeInt | None = None
    device: str
    factor: PositiveFloat
    layer: NonNegativeInt | None = None

    @property
    def key(self) -> tuple[int, bool]:
        """Rank, and whether it is about its speed."""
        return self.rank, self.layer is None


class Drift(Spec):
    """What departs, most of all first, and the simulated iteration as assumed and as measured (nominal seconds)."""

    departures: list[Departure]
    assumed_seconds: PositiveFloat
    measured_seconds: PositiveFloat

    def is_news_after(self, told: "Drift | None") -> bool:
        """Whether it is worth telling to who knows `told`: other ranks depart, or a factor has changed clearly."""
        known = {d.key: d.factor for d in told.departures} if told else {}
        found = {d.key: d.factor for d in self.departures}
        return known.keys() != found.keys() or any(_off(found[key] / known[key]) > TOLERANCE for key in found)

    def message(self) -> str:
        """One line."""
        load = [d for d in self.departures if d.layer is not None]
        speed = [d for d in self.departures if d.layer is None]
        rows = [f"{_name(d)} gets {d.factor:.2f} times the rows assumed in layer {d.layer}" for d in load[:NAMED]]
        seconds = [f"{_name(d)} takes {d.factor:.2f} times the seconds of its profile" for d in speed[:NAMED]]
        parts = [*rows, *_more(load), *seconds, *_more(speed)]
        if not parts:
            return "expert load and device speeds are as assumed again"
        ratio = self.measured_seconds / self.assumed_seconds
        return f"departs from what was assumed: {', '.join(parts)}: iteration {ratio:.2f} times the assumed (simulated)"


def _name(departure: Departure) -> str:
    group = "" if departure.group is None else f", group {departure.group}"
    return f"rank {departure.rank} ({departure.device}{group})"


def _more(departures: Sequence[Departure]) -> list[str]:
    return [f"and {len(departures) - NAMED} more"] if len(departures) > NAMED else []


def find_drift(plan: Plan, groups: Sequence[Group], assumed: MeasuredState, measured: MeasuredState) -> Drift:
    """Compare what was measured with what the placements of `groups`, those of `plan` with their experts where they
    are, were solved for."""
    before, after = (replay_measured(plan.inputs, groups, state) for state in (assumed, measured))
    names = [device.type for device in plan.inputs.devices()]
    group_of = {rank: number for number, group in enumerate(plan.groups) for ranks in group.replicas for rank in ranks}

    def departure(rank: int, factor: float, layer: int | None = None) -> Departure:
        group = group_of[rank] if plan.group_count > 1 else None
        return Departure(rank=rank, group=group, device=names[rank], factor=factor, layer=layer)

    old, new = _rows(before), _rows(after)
    factors = {rank: _load_factor(old[rank], new[rank]) for rank in sorted(old)}
    found = [departure(rank, *factor) for rank, factor in factors.items() if _off(factor[0]) > TOLERANCE]
    for rank, (once, now) in enumerate(zip(assumed.slowdown, measured.slowdown, strict=True)):
        if _off(now / once) > TOLERANCE:
            found.append(departure(rank, now / once))
    return Drift(
        departures=sorted(found, key=lambda d: -_off(d.factor)),
        assumed_seconds=before.seconds,
        measured_seconds=after.seconds,
    )


def _rows(replayed: Replayed) -> dict[int, FloatArray]:
    """[layers] rows of a micro-batch that every rank computes."""
    result: dict[int, FloatArray] = {}
    for g in replayed.groups:
        cost = LayoutCost(g.cost, g.group.layout)
        layers = range(cost.layout.layers)
        for local, ranks in enumerate(zip(*g.group.replicas, strict=True)):
            rows = np.array([sum(cost.expert_rows(local, layer, 0)) for layer in layers])
            result |= dict.fromkeys(ranks, rows)
    return result


def _load_factor(old: FloatArray, new: FloatArray) -> tuple[float, int]:
    """By what factor a rank's rows in a layer grew most, and in which; (1, 0) where none were assumed."""
    ratios = np.divide(new, old, out=np.ones(len(old)), where=old > 0)
    layer = int(ratios.argmax())
    return max(float(ratios[layer]), LEAST_FACTOR), layer


def _off(factor: float) -> float:
    """How far from 1, whether above or below."""
    return max(factor, 1 / factor)
