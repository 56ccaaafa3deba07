"""Rival: the best that a method finds; and the search over the layouts that a method allows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Literal

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.allowed import kept_choices, micro_batch_counts
from hetermoe_cli.planner.baselines.parts import parted_seconds
from hetermoe_cli.planner.orders import other_orders
from hetermoe_cli.planner.pipeline_search.setups import Tuned
from hetermoe_cli.planner.replay import Overflow, busy_bound, over_steps, overflow, replay_seconds
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Baseline
from hetermoe_cli.spec.schedule_choice import ScheduleChoice

# What runs beside an all-to-all: nothing; experts of other parts of the same micro-batch and layer (parts.py); any task
# of other micro-batches.
Overlap = Literal["none", "parts", "micro_batches"]

FAR = 1.15  # times the best: what no other order makes up for (4 % is the most that was seen)


@dataclass(frozen=True)
class Rival:
    """The fastest that a method finds; infinite seconds and the reason where there is nothing.

    Without a layout `reason` tells how a method runs that it has no layout for. `pipelines`: what `pp` timed, with
    its seconds, the fastest first (planner/pipelines/).
    """

    layout: Layout | None
    seconds: float
    reason: str = ""
    pipelines: Sequence[tuple[float, Tuned]] = ()

    def baseline(self) -> Baseline:
        """What a plan stores."""
        seconds = None if self.seconds == inf else self.seconds
        schedule = self.layout.schedule if self.layout else None
        return Baseline(iteration_seconds=seconds, schedule=schedule, reason=self.reason)


def schedules(cost: CostModel, sizes: Sequence[tuple[int, int]]) -> Iterator[list[ScheduleChoice]]:
    """For every recompute and dense state the schedules of those (R, window)."""
    for recompute, state in kept_choices(cost):
        yield [cost.schedule(count, width, recompute, state) for count, width in sizes]


def windows(cost: CostModel, counts: Iterable[int]) -> Iterator[list[ScheduleChoice]]:
    """For every R, recompute and dense state its windows, largest first: narrower ones gain nothing but memory."""
    for count in counts:
        yield from schedules(cost, [(count, width) for width in reversed(micro_batch_counts(count, count))])


def best(
    cost: CostModel,
    ladders: Iterable[Iterable[Layout]],
    size: Callable[[Layout], float] = lambda layout: 1.0,
    *,
    parts: bool = False,
) -> Rival:
    """The layout with the fewest seconds (per `size`) among the first that fits of every ladder.

    Each rung of a ladder needs less memory than the one before. What cannot win is not replayed. `reason` names the
    least overflow where nothing fits. `parts`: the layouts are sequential, and their all-to-alls are cut into parts.
    """
    fitting: list[tuple[float, LayoutCost]] = []
    worst: Overflow | None = None
    for ladder in ladders:
        found, missing = _first_fitting(cost, list(ladder))
        if found:
            fitting.append((over_steps(found, partial(busy_bound, exposed=not parts)) / size(found.layout), found))
        elif worst is None or (missing and missing.ratio < worst.ratio):
            worst = missing
    winner, seconds, ratio = None, inf, inf
    for bound, layout_cost in sorted(fitting, key=lambda pair: pair[0]):
        if bound < ratio:
            for layout, time in _times(layout_cost, parts, ratio * size(layout_cost.layout)):
                if time / size(layout) < ratio:
                    winner, seconds, ratio = layout, time, time / size(layout)
    return Rival(winner, seconds, "" if winner else f"does not fit: {worst}")


def _times(cost: LayoutCost, parts: bool, known: float) -> list[tuple[Layout, float]]:
    """A layout with its seconds, in every order if these are not far above `known` ones."""
    if parts:
        return [(cost.layout, over_steps(cost, parted_seconds))]
    seconds = replay_seconds(cost)
    return [(cost.layout, seconds), *(other_orders(cost) if seconds < FAR * known else ())]


def _first_fitting(cost: CostModel, ladder: Sequence[Layout]) -> tuple[LayoutCost | None, Overflow | None]:
    """The first rung that fits; if none does, by how much the last one misses. The last one is tried second."""
    first, last = LayoutCost(cost, ladder[0]), LayoutCost(cost, ladder[-1])
    if overflow(first) is None:
        return first, None
    if (missing := overflow(last)) is not None:
        return None, missing
    between = (LayoutCost(cost, layout) for layout in ladder[1:-1])
    return next((rung for rung in between if overflow(rung) is None), last), None


def with_schedule(layout: Layout, schedule: ScheduleChoice) -> Layout:
    """The same layout in another order; not checked again."""
    return layout.model_copy(update={"schedule": schedule})
