"""Drift: by how much a run's expert load and its devices' speeds depart from what its placement was solved for."""

from collections.abc import Sequence

import numpy as np

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.measured import MeasuredCost
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.base import NonNegativeInt, PositiveFloat, Spec
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.load import ExpertLoad
from hetermoe_cli.spec.plan import Inputs

TOLERANCE = 1.25  # factors up to here, or down to its inverse, are no departure
LEAST_FACTOR = 0.01  # reported: of a rank that gets no row any more, or is faster than its profile beyond belief
NAMED = 3  # ranks in a message


class Departure(Spec):
    """A rank's rows or seconds over those assumed. `layer`: where its rows depart most; null for its speed."""

    rank: NonNegativeInt
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
    return f"rank {departure.rank} ({departure.device})"


def _more(departures: Sequence[Departure]) -> list[str]:
    return [f"and {len(departures) - NAMED} more"] if len(departures) > NAMED else []


def find_drift(
    inputs: Inputs,
    layout: Layout,
    assumed: tuple[ExpertLoad | None, Sequence[float]],
    measured: tuple[ExpertLoad | None, Sequence[float]],
) -> Drift:
    """Compare (load, slowdown of every rank) as measured with what `layout` was solved for; None: a balanced router."""
    before, after = (LayoutCost(MeasuredCost(inputs, *state), layout) for state in (assumed, measured))
    names = [device.type for device in inputs.devices()]
    found = [
        Departure(rank=rank, device=names[rank], factor=factor, layer=layer)
        for rank, (factor, layer) in enumerate(_load_factors(before, after))
        if _off(factor) > TOLERANCE
    ]
    for rank, (old, new) in enumerate(zip(assumed[1], measured[1], strict=True)):
        if _off(new / old) > TOLERANCE:
            found.append(Departure(rank=rank, device=names[rank], factor=new / old))
    return Drift(
        departures=sorted(found, key=lambda d: -_off(d.factor)),
        assumed_seconds=simulate(before).seconds,
        measured_seconds=simulate(after).seconds,
    )


def _load_factors(before: LayoutCost, after: LayoutCost) -> list[tuple[float, int]]:
    """Per rank, by what factor its rows in a layer grew most, and in which; (1, 0) where no rows were assumed."""
    layers, result = range(before.layout.layers), []
    for rank in range(before.layout.world_size):
        old, new = (np.array([sum(cost.expert_rows(rank, layer, 0)) for layer in layers]) for cost in (before, after))
        ratios = np.divide(new, old, out=np.ones(len(old)), where=old > 0)
        layer = int(ratios.argmax())
        result.append((max(float(ratios[layer]), LEAST_FACTOR), layer))
    return result


def _off(factor: float) -> float:
    """How far from 1, whether above or below."""
    return max(factor, 1 / factor)
