"""Refine: other orders, and the search where a group is small enough for it; the slowest first, while time is left."""

import time
from dataclasses import replace

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.groups import FoundGroups
from hetermoe_cli.planner.cluster.replayed import ReplayedGroup, replay_groups
from hetermoe_cli.planner.orders import other_orders
from hetermoe_cli.planner.search.outer import search
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Group

MOST_DEVICES = 16
MOST_TASKS = 4000  # layers x experts: beyond, its linear programs take longer than they are worth
LEAST_SECONDS = 0.5


def refined(cost: CostModel, found: FoundGroups, solver: SolverOptions, limit: int) -> FoundGroups:
    """The same groups with better layouts where some are found."""
    deadline = time.monotonic() + solver.time_limit
    slowest = sorted(found.replayed.groups, key=lambda g: -g.computed)
    better: dict[int, Group] = {}
    for index, g in enumerate(slowest):
        left = (deadline - time.monotonic()) / (len(slowest) - index)
        layout = _better(g, replace(solver, time_limit=left), limit)
        if layout == g.group.layout:
            break  # a faster one does not end the iteration sooner
        better[id(g.group)] = Group.of(layout, g.group.replicas)
    if not better:
        return found
    groups = [better.get(id(g.group), g.group) for g in found.replayed.groups]
    replayed = replay_groups(cost.inputs, groups, cost)
    if replayed.seconds >= found.replayed.seconds:
        return found
    return FoundGroups(groups, replayed, found.compositions, found.evaluated)


def _better(g: ReplayedGroup, solver: SolverOptions, limit: int) -> Layout:
    """The group's layout, in another order or found by the search, if that is faster."""
    if solver.time_limit < LEAST_SECONDS:
        return g.group.layout
    began, own = time.monotonic(), LayoutCost(g.cost, g.group.layout)
    orders = [(g.group.layout, simulate(own).seconds), *other_orders(own)]
    best = min(orders, key=lambda pair: pair[1])[0]
    left = solver.time_limit - (time.monotonic() - began)
    if not _small(g) or left < LEAST_SECONDS:
        return best
    return search(g.cost, replace(solver, time_limit=left), limit, [best], heads=False).layout or best


def _small(g: ReplayedGroup) -> bool:
    model = g.cost.model
    return len(g.group.sequences_per_rank) <= MOST_DEVICES and model.layers * model.experts <= MOST_TASKS
