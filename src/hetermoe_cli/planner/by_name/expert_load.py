"""Planning under an expert load: the layouts found for a balanced router, their experts placed by name.

1. Every layout (the search's and the rivals') is replayed under the load with its experts placed by number.
2. named.py places its experts by name, for several aims and numbers of copies; the best is replayed with the layers
   assigned exactly.
3. Moves, swaps and copies of single experts, and other orders of the micro-batches, each judged by its replay.
Where the load has samples a replay's seconds are their mean: a copied expert takes no part in how far they differ.
No step can make the layout slower than the best of 1. There is no bound but that of perfectly divisible work.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.by_name.named import Aim, Named
from hetermoe_cli.planner.by_name.single_moves import improve_layers
from hetermoe_cli.planner.replay import Overflow, busy_bound, over_steps, overflow, replay_seconds
from hetermoe_cli.planner.search.outer import Found
from hetermoe_cli.planner.search.space import schedules_of
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import LoadReport

EVEN = 1 + 1e-9  # an imbalance up to here is none
LAYER_SECONDS = 0.3  # of the solver, for one layer
ATTEMPTS = 4  # at fitting a layout into memory
RUNNER_UPS = 3  # of the search, whose experts are placed by name as well


@dataclass
class Best:
    """The fastest layout so far under the load of `cost`, and the least overflow of those that do not fit."""

    cost: CostModel
    deadline: float
    layout: Layout | None = None
    seconds: float = inf
    lacks: Overflow | None = None

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.left < 0

    def offer(self, layout: Layout | None, *, quick: bool = True) -> bool:
        """Keep `layout` if it fits and its replay is the fastest. `quick`: not if that under the mean load is not, as
        steps are hardly ever faster in the mean than their mean."""
        if layout is None or layout.replicates_in_shifts:
            return False
        layout_cost = LayoutCost(self.cost, layout)
        lacks = overflow(layout_cost)
        if lacks is not None:
            self.lacks = lacks if self.lacks is None else min(self.lacks, lacks, key=lambda o: o.ratio)
            return False
        if over_steps(layout_cost, busy_bound) >= self.seconds:
            return False
        if quick and len(self.cost.steps) > 1 and simulate(layout_cost).seconds >= self.seconds:
            return False
        seconds = replay_seconds(layout_cost)
        if seconds >= self.seconds:
            return False
        self.layout, self.seconds = layout, seconds
        return True


def under_load(
    cost: CostModel, balanced: Found, rivals: Sequence[Layout | None], options: SolverOptions, bound: float
) -> tuple[Found, LoadReport]:
    """The plan for the expert load of `cost` from that for a balanced router; takes up to half its time limit more.

    UserError DOES_NOT_FIT if a balanced router's layout fits but none does under the load.
    """
    others = [runner_up.layout for runner_up in balanced.runner_ups[:RUNNER_UPS]]
    best = Best(cost, time.monotonic() + options.time_limit / 2)
    best.offer(balanced.layout)
    numbered = best.seconds if best.layout else None
    layouts = [layout for layout in (balanced.layout, *rivals, *others) if layout is not None]
    if layouts:
        place_by_name(best, layouts, options.name)
    proven = bound if best.layout else balanced.bound
    found = replace(balanced, layout=best.layout, seconds=best.seconds, bound=proven, status="feasible")
    found.exact_over = "not solved"
    return found, load_report(cost, balanced.seconds if balanced.layout else None, numbered)


def load_report(cost: CostModel, balanced: float | None, numbered: float | None) -> LoadReport:
    """Of the load of `cost`; seconds of the plan for a balanced router, with one and under the load by number."""
    assert cost.inputs.expert_load is not None
    imbalance = cost.inputs.expert_load.imbalance
    return LoadReport(
        imbalance_per_layer=imbalance,
        worst_layer=imbalance.index(max(imbalance)),
        balanced_iteration_seconds=balanced,
        numbered_iteration_seconds=numbered,
    )


def load_notes(report: LoadReport) -> list[str]:
    """What the plan assumes of the router, and what its gap is against."""
    imbalance = report.imbalance_per_layer
    mean, worst = sum(imbalance) / len(imbalance), imbalance[report.worst_layer]
    return [
        f"expert load assumed: the hottest expert gets {worst:.2f} times the mean in layer {report.worst_layer}, "
        f"{mean:.2f} times on average over the layers",
        "under an expert load the lower bound is that of perfectly divisible work",
    ]


def place_by_name(best: Best, layouts: Sequence[Layout], solver: str) -> None:
    """All three steps, starting with the first layout. UserError DOES_NOT_FIT if nothing fits."""
    for layout in layouts:
        best.offer(layout, quick=False)
    load = best.cost.inputs.expert_load
    uneven = load is not None and max(max(step.imbalance) for step in (load, *load.steps)) > EVEN
    source = _aimed(best, layouts) if uneven else None
    if best.layout is None:
        raise UserError(
            f"model {best.cost.model.name} on cluster {best.cost.inputs.cluster.name}: fits with a balanced router, "
            f"but not under the expert load: {best.lacks}: add memory, or plan for a load that is more even",
            ExitCode.DOES_NOT_FIT,
        )
    if source and best.left > 0:
        named, aim = source
        _offer_aim(best, named, aim, SolverOptions(solver, min(LAYER_SECONDS, best.left)))
    if uneven and best.left > 0:
        _improve(best, source[0] if source else Named(best.cost, best.layout))


def _aimed(best: Best, layouts: Sequence[Layout]) -> tuple[Named, Aim] | None:
    """Step 2 without the solver: what the best layout was made from, if it has its experts placed by name.

    The counts of the best layout are a new aim, as long as that helps.
    """
    source = None
    for number, layout in enumerate(layouts):
        source = _try_aims(best, layout, at_least_one=not number) or source
    source = _try_copies(best) or source
    while source and best.layout is not None and best.left > 0:
        if (better := _try_aims(best, best.layout)) is None:
            break
        source = better
    return source


def _try_aims(best: Best, layout: Layout, *, at_least_one: bool = False) -> tuple[Named, Aim] | None:
    """Every aim of one layout, while there is time or nothing fits; the one that the best layout is of, if any."""
    source, named = None, Named(best.cost, layout)
    for number, aim in enumerate(named.aims):
        wanted = best.left > 0 or best.layout is None or (at_least_one and not number)
        if wanted and _offer_aim(best, named, aim):
            source = named, aim
    return source


def _try_copies(best: Best) -> tuple[Named, Aim] | None:
    """The best layout with more and more of its hottest experts replicated; what it is of then, if that helps."""
    if best.layout is None:
        return None
    source, named = None, Named(best.cost, best.layout)
    for extra in _extras(best.layout.experts):
        aim = Aim(extra=extra)
        if best.left > 0 and _offer_aim(best, named, aim):
            source = named, aim
    return source


def _extras(experts: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 9, ... and all."""
    extra = 1
    while extra < experts:
        yield extra
        extra += max(1, extra // 2)
    yield experts


def _offer_aim(best: Best, named: Named, aim: Aim, exact: SolverOptions | None = None) -> bool:
    """Offer an aim's layout, made again with less room where memory is short: buffers grow with what a rank gets."""
    spare = np.zeros(named.world)
    for attempt in range(ATTEMPTS):
        layout = named.place(aim, exact, spare)
        if layout is None:
            return False
        excess = named.excess(layout)
        if (excess <= 0).all():
            return best.offer(layout)
        spare += np.maximum(excess, 0.0) if attempt else named.hot_bytes()
    return False


def _improve(best: Best, aimed: Named) -> None:
    """Single experts, then other orders, until neither helps or the time is over."""
    before = inf
    while best.layout is not None and best.left > 0 and best.seconds < before:
        before = best.seconds
        while improve_layers(aimed, best, best.layout):
            pass
        for schedule in [] if best.layout.pipeline else schedules_of(best.cost, best.layout.micro_batches):
            if best.left > 0 and best.layout.allows(schedule):
                best.offer(best.layout.model_copy(update={"schedule": schedule}))
