"""What a plan says of its pipeline stages, of pipelines that lost, and of the plan that they replaced."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.explained import binding_of_groups
from hetermoe_cli.planner.cluster.objective import CHEAPEST_WORK, Wanted, why_not_used
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.planner.pipelines.layouts import Found
from hetermoe_cli.planner.reasons.binding import SAME, reason_lost
from hetermoe_cli.planner.reasons.explain import not_used
from hetermoe_cli.spec.explanation import Explanation, LostLayout
from hetermoe_cli.spec.plan import Group, Plan

RUNNER_UPS = 4  # families of pipelines


def not_chosen(plan: Plan, why: str) -> Iterator[str]:
    """A pipeline that would be faster (with a balanced router), and why it is not the plan."""
    rival = plan.baselines.get("pp")
    if rival and rival.iteration_seconds and rival.iteration_seconds < plan.predicted.iteration_seconds:
        yield f"a pipeline over layers would take {rival.iteration_seconds:.3f} s (modelled), but {why}"


def without_stages(plan: Plan, wanted: Wanted) -> str:
    """Of the plan that pipelines replace."""
    told = f"the best plan without a pipeline takes {plan.predicted.iteration_seconds:.3f} s"
    if wanted.objective == "cost" and plan.economy:
        return f"{told} and trains {plan.economy.tokens_per_dollar:,.0f} tokens a dollar"
    return told


def pipeline_notes(
    cost: CostModel, groups: Sequence[Group], used: Sequence[int], wanted: Wanted, told: str
) -> Iterator[str]:
    """Stages, devices that are left out, and what the bound is. `told`: of plans without a pipeline."""
    yield f"{'; '.join(_stages(cost, group) for group in groups)}; {told}"
    yield from not_used(cost, used, why_not_used(wanted))
    if wanted.objective == "cost":
        yield CHEAPEST_WORK
    else:
        yield "the search over pipelines is heuristic; its lower bound is perfectly divisible work"


def _stages(cost: CostModel, group: Group) -> str:
    """`2 pipeline stages: layers 0-24 on 8 A100-80, 25-47 on 8 A40`."""
    ranks, parts = group.replicas[0], []
    for span in group.layout.spans:
        types = [cost.devices[ranks[local]].type for local in span.ranks]
        names = " + ".join(f"{types.count(name)} {name}" for name in dict.fromkeys(types))
        layers = f"{span.first}-{span.end - 1}" if span.end - span.first > 1 else str(span.first)
        parts.append(f"{layers} on {names}{group.layout.recomputation_of(span)}")
    copies = f"{len(group.replicas)} pipelines of " if len(group.replicas) > 1 else ""
    return f"{copies}{len(parts)} pipeline stages: layers {', '.join(parts)}"


class _Lost(NamedTuple):
    """A plan that was not chosen."""

    family: str
    schedule: str
    seconds: float
    path: dict[str, float]


def lost_pipelines(
    cost: CostModel,
    winner: Explanation,
    seconds: float,
    groups: Sequence[Group],
    others: Sequence[Found],
    beaten: Plan | None,
    asked: str,
) -> list[LostLayout]:
    """Why others lost against `groups`, which take `seconds`: the best of each family, and the plan without stages that
    was `beaten`. `asked`: why a faster one did."""
    best: dict[str, Found] = {}
    for other in sorted(others, key=lambda one: one[0]):
        best.setdefault(_family(other[1]), other)
    best.pop(_family(groups), None)
    lost = [_replayed(cost, family, found) for family, found in list(best.items())[:RUNNER_UPS]]
    if beaten and beaten.explanation:
        path, taken = beaten.explanation.critical_path, beaten.predicted.iteration_seconds
        lost.append(_Lost("no pipeline stages", str(beaten.groups[0].schedule), taken, path))
    return [_told(one, winner, seconds, asked) for one in sorted(lost, key=lambda one: one.seconds)]


def _replayed(cost: CostModel, family: str, found: Found) -> _Lost:
    seconds, groups = found
    path = binding_of_groups(replay_groups(cost.inputs, groups, cost)).critical_path
    return _Lost(family, "; ".join(_stages(cost, group) for group in groups), seconds, path)


def _told(lost: _Lost, winner: Explanation, seconds: float, asked: str) -> LostLayout:
    ratio, reason = lost.seconds / seconds, "as fast"
    if ratio < 1 - SAME:
        reason = f"{1 - ratio:.1%} faster, but {asked}"
    elif ratio > 1 + SAME:
        reason = reason_lost(lost.path, lost.seconds, winner.critical_path, seconds)
    return LostLayout(
        family=lost.family,
        schedule=lost.schedule,
        iteration_seconds=lost.seconds,
        slower=max(0.0, ratio - 1),
        critical_path=lost.path,
        reason=reason,
    )


def _family(groups: Sequence[Group]) -> str:
    """`2 pipelines of 4 stages, woven`."""
    stages = sorted({len(group.layout.spans) for group in groups})
    count = sum(len(group.replicas) for group in groups)
    kind = "woven" if groups[0].schedule.passes == "woven" else "1F1B"
    return f"{count} pipeline{'s' * (count > 1)} of {' or '.join(map(str, stages))} stages, {kind}"
