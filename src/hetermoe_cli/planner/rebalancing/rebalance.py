"""Rebalancing: whether other places for named experts pay under a measured load, sequences and schedules kept.

Experts move inside a group, each of which holds all of them, or inside a pipeline stage of it. An iteration lasts as
long as the slowest group's, so that groups are searched from the slowest on (group_moves.py), and only down to what
those before still take; the rest stay as they are. What was found is replayed together, as moved experts can take
longer to sum over groups.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from hetermoe_cli.cost.measured import MeasuredState
from hetermoe_cli.cost.moving import moves, moving_seconds
from hetermoe_cli.planner.cluster.replayed import Replayed, replay_measured, replay_moved
from hetermoe_cli.planner.rebalancing.group_moves import Search, search
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Group, Plan
from hetermoe_cli.spec.rebalance import Decision

SOLVE_SECONDS = 3.0  # of all groups
LEAST_GAIN = 0.02  # of the iteration: less is within what a prediction is off
NOT_FASTER = "no placement is predicted to be clearly faster"
UNSTEADY = "the load is not steady: what would have been best some steps ago is no better now than what is there"


@dataclass(frozen=True)
class _Found:
    """Every group's layout, null where none fits into memory, and its shortest iteration whatever moving takes."""

    layouts: list[Layout | None]
    fastest: float


def decide(
    plan: Plan, groups: Sequence[Group], now: MeasuredState, earlier: MeasuredState, remaining_steps: int
) -> Decision:
    """Where the experts of `groups`, those of `plan`, should be for the `remaining_steps` under the load of `now`.

    `earlier`: of the steps before those, at the same speeds. What would have been best then must be faster now, or else
    the load moves on too fast for any placement.
    """
    replayed = replay_measured(plan.inputs, groups, now)
    before, current = replayed.seconds, [g.group.layout for g in replayed.groups]
    found = _search(plan, replayed, remaining_steps)
    layouts = [layout for layout in found.layouts if layout]
    if len(layouts) < len(current):
        return _stay(before, "no placement fits into memory under this load")
    if layouts == current:
        gain = before - found.fastest
        return _stay(before, NOT_FASTER if gain < LEAST_GAIN * before else _too_long(gain, remaining_steps))
    after, pairs = replay_moved(plan.inputs, replayed, layouts), list(zip(replayed.groups, layouts, strict=True))
    move_seconds = max(moving_seconds(g.cost, g.group.layout, to) for g, to in pairs)
    if not any(_overflows(replayed)):
        if (gain := before - after.seconds) < LEAST_GAIN * before:
            return _stay(before, NOT_FASTER)
        if gain * remaining_steps <= move_seconds:  # another group is as slow as before
            return _stay(before, _too_long(gain, remaining_steps))
        then = _search(plan, replay_measured(plan.inputs, groups, earlier), remaining_steps).layouts
        best = [layout or here for layout, here in zip(then, current, strict=True)]
        if before - replay_moved(plan.inputs, replayed, best).seconds < LEAST_GAIN * before:
            return _stay(before, UNSTEADY)
    travelling = [len(g.group.replicas) * len(move.targets) for g, to in pairs for move in moves(g.group.layout, to)]
    return Decision(
        groups=_merged(plan, after),
        before_seconds=before,
        after_seconds=after.seconds,
        move_seconds=move_seconds,
        moved=sum(travelling),
    )


def _stay(seconds: float, reason: str) -> Decision:
    return Decision(
        groups=None, reason=reason, before_seconds=seconds, after_seconds=seconds, move_seconds=0.0, moved=0
    )


def _too_long(gain: float, remaining_steps: int) -> str:
    return f"moving takes longer than the {gain * 1e3:.3g} ms an iteration that {remaining_steps} steps gain"


def _search(plan: Plan, replayed: Replayed, remaining_steps: int) -> _Found:
    """Groups from the slowest on; those that do not fit as they are come first."""
    end, planned, full = time.monotonic() + SOLVE_SECONDS, _by_rank(plan), _overflows(replayed)
    ready = [replayed.ready(number) for number in range(len(full))]
    layouts: list[Layout | None] = [g.group.layout for g in replayed.groups]
    order = sorted(range(len(full)), key=lambda number: (not full[number], -ready[number]))
    floor = fastest = 0.0
    for place, number in enumerate(order):
        group = replayed.groups[number].group
        if ready[number] <= floor and not full[number]:
            fastest = max(fastest, ready[number] + replayed.optimizer)
            continue
        now = time.monotonic()
        until = now + (end - now) / (len(order) - place)
        optimizer = max((g.optimizer for other, g in enumerate(replayed.groups) if other != number), default=0.0)
        cost_of = partial(replayed.with_placement, number)
        found = Search(cost_of, group.layout, remaining_steps, until, (floor, optimizer))
        search(found, planned[group.replicas[0][0]].layout)
        layouts[number] = found.layout
        floor, fastest = max(floor, found.ready), max(fastest, found.fastest)
    return _Found(layouts, fastest)


def _overflows(replayed: Replayed) -> list[bool]:
    """Whether each group exceeds the memory of its devices."""
    return [not g.fits for g in replayed.groups]


def _by_rank(plan: Plan) -> dict[int, Group]:
    """The plan's group of every rank."""
    return {rank: group for group in plan.groups for ranks in group.replicas for rank in ranks}


def _merged(plan: Plan, replayed: Replayed) -> list[Group]:
    """Groups of the same copies in the same order; neighbours from one group of the plan are one where they agree."""
    planned = _by_rank(plan)
    copies = [(planned[ranks[0]], g.group, ranks) for g in replayed.groups for ranks in g.group.replicas]
    return [
        Group.of(placed[1].layout, [ranks for _, _, ranks in [placed, *rest]])
        for _, (placed, *rest) in groupby(copies, key=lambda copy: (id(copy[0]), copy[1].placement))
    ]
