"""Plan several groups: the search over groups, its bounds, and what the plan says of it."""

import datetime
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from math import inf

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.bounds.work import work_bound
from hetermoe_cli.planner.by_name.expert_load import load_notes
from hetermoe_cli.planner.cluster.bound import groups_bound
from hetermoe_cli.planner.cluster.even_groups import EvenGroups, even_groups
from hetermoe_cli.planner.cluster.explained import binding_of_groups
from hetermoe_cli.planner.cluster.groups import FAR, FoundGroups, find_groups
from hetermoe_cli.planner.cluster.loaded import groups_under_load
from hetermoe_cli.planner.cluster.objective import (
    CHEAPEST_WORK,
    Wanted,
    economy,
    least_dollars,
    priced_bound,
    why_not_used,
)
from hetermoe_cli.planner.cluster.refine import refined
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.planner.reasons.explain import not_used, sources
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.plan import Bound, Economy, Plan, Prediction, SolverReport, ranks_in
from hetermoe_cli.spec.train import DenseState

RIVALS_SHARE = 0.05  # of the time limit, for each rival
ONE_GROUP = 16  # up to so many devices one group is planned first


def wants_groups(cost: CostModel, wanted: Wanted) -> bool:
    """Whether to plan groups, or parts of the cluster, from the start."""
    return wanted.needs_prices or (wanted.most_groups != 1 and len(cost.devices) > ONE_GROUP)


def plan_groups(
    cost: CostModel,
    embedded: Inputs,
    solver: SolverOptions,
    limit: int,
    wanted: Wanted,
    progress: Callable[[str], None] = lambda text: None,
    *,
    beat: float = inf,
) -> Plan:
    """The best plan of any number of groups. UserError if nothing fits, or nothing within the limit on cost.

    `beat`: what one group over the whole cluster takes, if that is known: it is not looked at then, and groups that
    are far slower are not improved.
    """
    began = time.monotonic()
    progress("rivals")
    rivals = even_groups(cost.balanced, limit, wanted.most_groups, RIVALS_SHARE * solver.time_limit)
    remaining = replace(solver, time_limit=solver.time_limit - (time.monotonic() - began))
    found, load = _searched(cost.balanced, rivals.values(), remaining, limit, wanted, progress, beat), None
    seconds = found.replayed.seconds
    if cost.inputs.expert_load:
        progress("placing experts by name")
        loaded = groups_under_load(cost, found.groups, seconds, solver)
        seconds, load = loaded.seconds, loaded.report
        found = replace(found, groups=loaded.groups, replayed=replay_groups(cost.inputs, loaded.groups, cost))
    replayed, used = found.replayed, ranks_in(found.groups)
    paid = economy(cost, used, seconds, limit)
    bound = bound_of_groups(cost, limit, wanted, paid)
    return Plan(
        date=datetime.date.today(),
        assignment="optimal",
        objective=wanted.objective,
        max_groups=wanted.most_groups,
        groups=found.groups,
        predicted=Prediction.of(cost.train, seconds, replayed.busy_share(len(cost.devices)), replayed.seconds),
        bound=bound,
        gap=max(0.0, 1 - bound.iteration_seconds / seconds),
        memory=replayed.memory(cost),
        baselines={name: rival.baseline() for name, rival in rivals.items()},
        economy=paid,
        solver=SolverReport(
            name=solver.name,
            status="feasible",
            seconds=time.monotonic() - began,
            candidates=found.compositions,
            solved=found.evaluated,
        ),
        load=load,
        explanation=binding_of_groups(replayed),
        notes=[*_notes(cost, found, used, wanted), *(load_notes(load) if load else [])],
        inputs=embedded,
        inputs_sha256=embedded.hashes(),
    )


def _searched(
    cost: CostModel,
    rivals: Iterable[EvenGroups],
    solver: SolverOptions,
    limit: int,
    wanted: Wanted,
    progress: Callable[[str], None],
    beat: float,
) -> FoundGroups:
    """The best groups for a balanced router, no slower than `rivals`, improved in what is left of the time."""
    began = time.monotonic()
    find = partial(find_groups, solver=solver, limit=limit, wanted=wanted, progress=progress, beat=beat)
    found = _of_one_state(cost, find)
    if not wanted.needs_prices:
        found = _no_slower(found, rivals)
    progress("improving groups")
    left = max(0.0, solver.time_limit - (time.monotonic() - began)) if found.replayed.seconds < FAR * beat else 0.0
    state = found.groups[0].schedule.dense_state
    return refined(_with_state(cost, state), found, replace(solver, time_limit=left), limit)


def _of_one_state(cost: CostModel, find: Callable[[CostModel], FoundGroups]) -> FoundGroups:
    """The best groups that hold the dense part in one way: the engine shares out optimizer states over all or none."""
    found = find(cost)
    states = sorted({group.schedule.dense_state for group in found.groups})
    if len(states) == 1:
        return found
    alternatives: list[FoundGroups] = []
    for state in states:
        try:
            alternatives.append(find(_with_state(cost, state)))
        except UserError as error:
            if error.code is not ExitCode.DOES_NOT_FIT or (not alternatives and state == states[-1]):
                raise
    return min(alternatives, key=lambda one: one.merit)


def _with_state(cost: CostModel, state: DenseState) -> CostModel:
    """The same costs where the training spec leaves no other state."""
    return CostModel(cost.inputs.with_train(dense_state=state))


def _no_slower(found: FoundGroups, rivals: Iterable[EvenGroups]) -> FoundGroups:
    """The fastest of what was found and the rivals."""
    best = found
    for rival in rivals:
        if rival.replayed and rival.replayed.seconds < best.replayed.seconds:
            best = FoundGroups(rival.groups, rival.replayed, found.compositions, found.evaluated)
    return best


def bound_of_groups(cost: CostModel, limit: int, wanted: Wanted, paid: Economy | None = None) -> Bound:
    """Seconds that no plan can beat. For the cost objective: at this plan's price, the dollars that none can beat."""
    bound = groups_bound(cost, limit)
    if wanted.needs_prices:
        bound = priced_bound(bound, least_dollars(cost, limit), wanted, paid)
    return Bound(iteration_seconds=bound, work_iteration_seconds=work_bound(cost, limit), exact_over="not solved")


def _notes(cost: CostModel, found: FoundGroups, used: list[int], wanted: Wanted) -> Iterator[str]:
    yield from sources(cost)
    yield from not_used(cost, used, why_not_used(wanted))
    replayed = found.replayed
    if len(found.groups) + len(found.groups[0].replicas) > 2:
        yield (
            f"synchronising the groups adds {replayed.synchronise:.3f} s, "
            f"{replayed.synchronise / replayed.seconds:.1%} of the iteration; modelled on the NICs alone"
        )
    if wanted.objective == "cost":
        yield CHEAPEST_WORK
    else:
        yield "the search over groups is heuristic; its lower bound is perfectly divisible work with NICs and memory"
