"""Groups under an expert load: those found for a balanced router, each with its experts placed by name."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.by_name.expert_load import Best, load_report, place_by_name
from hetermoe_cli.planner.cluster.replayed import group_cost, iteration_seconds
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.plan import Group, LoadReport


@dataclass(frozen=True)
class Loaded:
    """Groups under an expert load, the seconds of an iteration, and what is to be told of it (nothing without one)."""

    groups: list[Group]
    seconds: float
    report: LoadReport | None


def groups_under_load(cost: CostModel, groups: Sequence[Group], balanced: float, options: SolverOptions) -> Loaded:
    """The same groups under the expert load of `cost`; takes up to half the time limit more. `balanced`: seconds of
    their iteration with a balanced router.

    UserError DOES_NOT_FIT if the memory of a group does not hold its load.
    """
    end, placed = time.monotonic() + options.time_limit / 2, []
    for index, group in enumerate(groups):
        now = time.monotonic()
        best = Best(_cost_among(cost, group, groups), now + (end - now) / (len(groups) - index))
        place_by_name(best, [group.layout], options.name)
        assert best.layout is not None
        placed.append(Group.of(best.layout, group.replicas))
    numbered = numbered_under_load(cost, groups, balanced)
    seconds = numbered.seconds if placed == numbered.groups else _mean_seconds(cost, placed)
    if numbered.seconds <= seconds:  # moved experts can take longer to synchronise
        return numbered
    return Loaded(placed, seconds, numbered.report)


def numbered_under_load(cost: CostModel, groups: Sequence[Group], balanced: float) -> Loaded:
    """The same groups with their experts where they are; infinite seconds where memory does not hold the load."""
    fits = not any(overflow(LayoutCost(_cost_among(cost, group, groups), group.layout)) for group in groups)
    seconds = _mean_seconds(cost, groups) if fits else inf
    return Loaded([*groups], seconds, load_report(cost, balanced, seconds if fits else None))


def _cost_among(cost: CostModel, group: Group, groups: Sequence[Group]) -> CostModel:
    """Costs of a group's devices, where states are shared out over all copies of the model."""
    copies = sum(len(other.replicas) for other in groups)
    return group_cost(cost.inputs, group, copies)


def _mean_seconds(cost: CostModel, groups: Sequence[Group]) -> float:
    """Of an iteration, over the samples of the expert load."""
    return fmean(iteration_seconds(step.inputs, groups, step) for step in cost.steps)
