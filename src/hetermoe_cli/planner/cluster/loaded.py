"""Groups under an expert load: those found for a balanced router, each with its experts placed by name."""

import time
from collections.abc import Sequence
from statistics import fmean

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.replayed import group_cost, replay_groups
from hetermoe_cli.planner.expert_load import Best, load_report, place_by_name
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.plan import Group, LoadReport


def groups_under_load(
    cost: CostModel, groups: Sequence[Group], balanced: float, options: SolverOptions
) -> tuple[list[Group], LoadReport]:
    """The same groups under the expert load of `cost`; takes up to half the time limit more. `balanced`: seconds of
    their iteration with a balanced router.

    UserError DOES_NOT_FIT if the memory of a group does not hold its load.
    """
    end, placed, fits = time.monotonic() + options.time_limit / 2, [], True
    for index, group in enumerate(groups):
        own, now = group_cost(cost.inputs, group), time.monotonic()
        best = Best(own, now + (end - now) / (len(groups) - index))
        place_by_name(best, [group.layout], options.name)
        assert best.layout is not None
        placed.append(Group.of(best.layout, group.replicas))
        fits = fits and overflow(LayoutCost(own, group.layout)) is None
    numbered = mean_seconds(cost, groups) if fits else None
    moved_are_slower = numbered and numbered < mean_seconds(cost, placed)  # they can take longer to synchronise
    return [*groups] if moved_are_slower else placed, load_report(cost, balanced, numbered)


def mean_seconds(cost: CostModel, groups: Sequence[Group]) -> float:
    """Of an iteration, over the samples of the expert load."""
    return fmean(replay_groups(step.inputs, groups, step).seconds for step in cost.steps)
