"""Why a layout takes as long as it does: what binds it, and why other layouts lost."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.planner.reasons.critical_path import critical_path, shares
from hetermoe_cli.planner.replay import Overflow, busy_bound, over_steps, overflow, replay_seconds, typical, usages
from hetermoe_cli.planner.search.runner_up import RunnerUp, best_of_families, family
from hetermoe_cli.planner.search.space import schedules_of
from hetermoe_cli.spec.explanation import Explanation, LostLayout, TightMemory

TIGHT = 0.95  # of the usable bytes
SAME = 1e-3  # seconds this close, as a share, are equal: the solver's tolerance


@dataclass
class Alternatives:
    """Other layouts: those that fit, and the fastest one that does not, with what it lacks."""

    fitting: list[RunnerUp] = field(default_factory=list)
    excluded: RunnerUp | None = None
    lacks: Overflow | None = None


def binding(cost: LayoutCost) -> Explanation:
    """The resources along the critical path of a typical step's replay, and the memory that is nearly full."""
    path = _path(cost)
    return Explanation(critical_path=path, binding=next(iter(path)), tight_memory=tight_memory(cost))


def _path(cost: LayoutCost) -> dict[str, float]:
    step = typical(cost)
    return shares(step, critical_path(step))


def with_runner_ups(
    explanation: Explanation, cost: LayoutCost, seconds: float, others: Iterable[RunnerUp], time_limit: float
) -> Explanation:
    """The explanation of a layout that takes `seconds`, with what is known of `others` and of other orders of it."""
    found = alternatives(cost, seconds, time_limit)
    own = family(cost.cost, cost.layout)
    best = best_of_families([*others, *found.fitting])
    lost = [_lost(cost, explanation, seconds, other) for other in best if other.family != own]
    return explanation.model_copy(update={"runner_ups": lost, "memory_excluded": _excluded(found, seconds)})


def alternatives(cost: LayoutCost, seconds: float, time_limit: float) -> Alternatives:
    """The layout's placement in every other order of its micro-batches, for up to `time_limit` seconds.

    Of those that do not fit only the fastest counts, and only if it takes less than `seconds`.
    """
    result, fastest, end = Alternatives(), seconds * (1 - SAME), time.monotonic() + time_limit
    for other in sorted(_reordered(cost), key=busy_bound):
        if time.monotonic() > end:
            break
        lacks = overflow(other)
        if lacks is None:
            result.fitting.append(RunnerUp.of(cost.cost, other.layout, replay_seconds(other)))
        elif over_steps(other, busy_bound) < fastest and (replayed := replay_seconds(other)) < fastest:
            result.excluded, result.lacks = RunnerUp.of(cost.cost, other.layout, replayed), lacks
            fastest = replayed
    return result


def _reordered(cost: LayoutCost) -> Iterator[LayoutCost]:
    layout = cost.layout
    for schedule in schedules_of(cost.cost, layout.micro_batches):
        if schedule != layout.schedule and layout.allows(schedule):
            yield LayoutCost(cost.cost, layout.model_copy(update={"schedule": schedule}))


def tight_memory(cost: LayoutCost) -> list[TightMemory]:
    """By type, the ranks whose memory is nearly full."""
    fullest: dict[str, Overflow] = {}
    ranks: dict[str, list[int]] = {}
    for usage in usages(cost):
        if usage.ratio > TIGHT:
            ranks.setdefault(usage.device, []).append(usage.rank)
            fullest[usage.device] = max(fullest.get(usage.device, usage), usage, key=lambda u: u.ratio)
    return [
        TightMemory(device=name, ranks=ranks[name], share=usage.ratio, largest_kind=usage.largest_kind)
        for name, usage in fullest.items()
    ]


def _excluded(found: Alternatives, seconds: float) -> str:
    if found.excluded is None:
        return ""
    faster = 1 - found.excluded.seconds / seconds
    return f"{found.excluded.layout.schedule} would be {faster:.1%} faster, but {found.lacks}"


def _lost(cost: LayoutCost, winner: Explanation, seconds: float, other: RunnerUp) -> LostLayout:
    layout_cost = LayoutCost(cost.cost, other.layout)
    taken, path = replay_seconds(layout_cost), _path(layout_cost)
    slower = max(0.0, taken / seconds - 1)
    return LostLayout(
        family=other.family,
        schedule=str(other.layout.schedule),
        iteration_seconds=taken,
        slower=slower,
        critical_path=path,
        reason=reason_lost(path, taken, winner.critical_path, seconds) if slower > SAME else "as fast",
    )


def reason_lost(path: dict[str, float], seconds: float, winners: dict[str, float], fastest: float) -> str:
    """The resource that the path spends more time on than the winner's, by the most."""

    def more(name: str) -> float:
        return path[name] * seconds - winners.get(name, 0.0) * fastest

    most = max(path, key=more)
    here = f"{winners[most] * fastest:.3g} s" if most in winners else "none"
    return f"{most}: {path[most] * seconds:.3g} s of its critical path ({path[most]:.0%}), {here} of the plan's"
