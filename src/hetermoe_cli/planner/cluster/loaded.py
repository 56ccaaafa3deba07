"""Groups under an expert load: those found for a balanced router, each with its experts placed by name."""

import time
from collections.abc import Sequence
from statistics import fmean

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.groups import FoundGroups
from hetermoe_cli.planner.cluster.replayed import group_cost, replay_groups
from hetermoe_cli.planner.expert_load import Best, load_report, place_by_name
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.plan import Group, LoadReport


def groups_under_load(cost: CostModel, found: FoundGroups, options: SolverOptions) -> tuple[FoundGroups, LoadReport]:
    """The same groups under the expert load of `cost`; takes up to half the time limit more.

    UserError DOES_NOT_FIT if the memory of a group does not hold its load.
    """
    end, groups, fits = time.monotonic() + options.time_limit / 2, [], True
    for index, group in enumerate(found.groups):
        own, now = group_cost(cost.inputs, group), time.monotonic()
        best = Best(own, now + (end - now) / (len(found.groups) - index))
        place_by_name(best, [group.layout], options.name)
        assert best.layout is not None
        groups.append(Group.of(best.layout, group.replicas))
        fits = fits and overflow(LayoutCost(own, group.layout)) is None
    numbered = mean_seconds(cost, found.groups) if fits else None
    report = load_report(cost, found.replayed.seconds, numbered)
    if numbered and numbered < mean_seconds(cost, groups):  # moved experts can take longer to synchronise
        groups = found.groups
    return FoundGroups(groups, replay_groups(cost.inputs, groups, cost), found.compositions, found.evaluated), report


def mean_seconds(cost: CostModel, groups: Sequence[Group]) -> float:
    """Of an iteration, over the samples of the expert load."""
    return fmean(replay_groups(step.inputs, groups, step).seconds for step in cost.steps)
