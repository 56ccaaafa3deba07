"""The plan with pipeline stages, where it is faster than the best one without.

Under an expert load pipelines are found for a balanced router; then their experts are placed by name.
"""

import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.baselines.pipeline import overlapped_pipelines
from hetermoe_cli.planner.cluster.explained import binding_of_groups
from hetermoe_cli.planner.cluster.loaded import Loaded, groups_under_load, numbered_under_load
from hetermoe_cli.planner.cluster.objective import (
    CHEAPEST_WORK,
    Wanted,
    economy,
    least_dollars,
    merit,
    priced_bound,
    why_not_used,
)
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.planner.expert_load import load_notes
from hetermoe_cli.planner.explain import not_used, sources
from hetermoe_cli.planner.pipeline_bound import pipeline_bound
from hetermoe_cli.planner.pipeline_parts import PartSetups, promising_parts
from hetermoe_cli.planner.pipelines import Setups, best_pipelines, plain_pipelines
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.plan import Assignment, Bound, Group, Inputs, LoadReport, Plan, Prediction, SolverReport

WORTH = 0.01  # of the iteration: by how much pipelines, or several groups, must be faster
NEAR = 1.05  # times what is to be beaten: what replays are faster than estimates at most
_NONE = "no pipeline fits as a plan: into memory, into --max-groups, or with NICs of its own"
SHARE = 0.3  # of the time limit, beside what other plans take
SHARE_OF_NODES = 0.15  # the same where units are whole nodes: each replay takes longer, and the others get the rest


@dataclass(frozen=True)
class Chosen:
    """Groups with pipeline stages, the seconds of an iteration, and what these are by the objective; under an expert
    load, what is to be told of it."""

    seconds: float
    groups: list[Group]
    merit: float
    load: LoadReport | None = None


def with_pipelines(
    plan: Plan, cost: CostModel, rivals: Setups, wanted: Wanted, seconds_left: float, solver: SolverOptions, limit: int
) -> Plan:
    """Pipelines that are clearly better than `plan`, or that were asked for (assignment pp: the first of `rivals` that
    fits); else the plan, and why not where pp is faster. `limit`: the largest R of layouts, for the bound."""
    began = time.monotonic()
    if plan.assignment == "pp":
        return _instead(plan, cost, _pp(plan, cost, rivals), wanted, limit, began)
    against, found = reason_against(cost, plan.assignment, wanted), None
    if not against:
        known = merit(cost.inputs.cluster, wanted, _used(plan.groups), plan.predicted.iteration_seconds)
        found = _search(cost, wanted, known, seconds_left, solver)
        if found and found.merit < (1 - WORTH) * known:
            return _instead(plan, cost, found, wanted, limit, began)
    told = [*plan.notes, *_not_chosen(plan, against, found)]
    return plan.model_copy(update={"notes": told})


def pipelines_alone(inputs: Inputs, cost: CostModel, wanted: Wanted, solver: SolverOptions, limit: int) -> Plan | None:
    """The best pipelines where no plan without fits, if any do. `inputs`: what the plan keeps of the cost's."""
    began = time.monotonic()
    if reason_against(cost, "optimal", wanted):
        return None
    found = _search(cost, wanted, inf, SHARE * solver.time_limit, solver)
    if not found:
        return None
    base = {
        "assignment": "optimal",
        "objective": wanted.objective,
        "baselines": {},
        "solver": SolverReport(name=solver.name, status="feasible", seconds=0.0),
        "inputs": inputs,
        "inputs_sha256": inputs.hashes(),
    }
    return _planned(base, "no plan without a pipeline fits", cost, found, wanted, limit, began)


def _search(cost: CostModel, wanted: Wanted, known: float, seconds_left: float, solver: SolverOptions) -> Chosen | None:
    """The best pipelines by the objective, which should be less than `known`."""
    if not wanted.needs_prices:
        setups = overlapped_pipelines(cost.balanced, NEAR * known, wanted.most_groups)
        return _best(PartSetups(cost, list(range(len(cost.devices))), setups), wanted, seconds_left, solver)
    parts = promising_parts(cost, wanted, known, NEAR, seconds_left)
    found = [_best(part, wanted, seconds_left / len(parts), solver) for part in parts]
    whole = [replace(one, groups=part.whole(one.groups)) for one, part in zip(found, parts, strict=True) if one]
    return min(whole, key=lambda one: one.merit, default=None)


def _best(part: PartSetups, wanted: Wanted, seconds_left: float, solver: SolverOptions) -> Chosen | None:
    """The best of the setups that fits; under an expert load, of those for a balanced router the first that does."""
    cost = part.cost
    found = best_pipelines(cost.balanced, part.setups, seconds_left)
    for seconds, groups in sorted(found, key=lambda one: merit(cost.inputs.cluster, wanted, _used(one[1]), one[0])):
        chosen = Loaded(groups, seconds, None)
        if cost.inputs.expert_load:
            try:
                chosen = groups_under_load(cost, groups, seconds, solver)
            except UserError as error:
                if error.code is not ExitCode.DOES_NOT_FIT:
                    raise
                continue
        value = merit(cost.inputs.cluster, wanted, _used(chosen.groups), chosen.seconds)
        return Chosen(chosen.seconds, chosen.groups, value, chosen.report)
    return None


def _used(groups: Sequence[Group]) -> list[int]:
    """Ranks in some group."""
    return sorted(rank for group in groups for ranks in group.replicas for rank in ranks)


def _pp(plan: Plan, cost: CostModel, setups: Setups) -> Chosen:
    """The rival itself, its experts placed by number. UserError if it does not fit, or cannot be what was asked for."""
    if against := reason_against(cost, "optimal", Wanted()):
        raise UserError(f"assignment pp: {against}: plan it without")
    found = plain_pipelines(cost.balanced, setups)
    if found is None:
        rival = plan.baselines["pp"]
        raise UserError(f"assignment pp: {_NONE if setups else rival.reason}", ExitCode.DOES_NOT_FIT)
    seconds, groups = found
    if cost.inputs.expert_load is None:
        return Chosen(seconds, groups, seconds)
    loaded = numbered_under_load(cost, groups, seconds)
    if loaded.seconds == inf:
        raise UserError("assignment pp: fits with a balanced router only", ExitCode.DOES_NOT_FIT)
    return Chosen(loaded.seconds, groups, loaded.seconds, loaded.report)


def reason_against(cost: CostModel, assignment: Assignment, wanted: Wanted) -> str:
    """Why no pipelines are looked at; empty where they are."""
    if assignment != "optimal":
        return f"assignment {assignment} was asked for"
    if not wanted.stages:
        return "--no-pipeline was asked for"
    if cost.train.dense_state == "full":
        return "its stages cannot share out all of the dense part, as dense_state full asks for"
    return ""


def _not_chosen(plan: Plan, against: str, found: Chosen | None) -> Iterator[str]:
    """A pipeline that would be faster (with a balanced router), and why it is not the plan."""
    rival = plan.baselines.get("pp")
    if not rival or not rival.iteration_seconds or rival.iteration_seconds >= plan.predicted.iteration_seconds:
        return
    replayed = f"as a plan it would take {found.seconds:.3f} s" if found else ""
    yield (
        f"a pipeline over layers would take {rival.iteration_seconds:.3f} s (modelled), but "
        f"{against or replayed or _NONE}"
    )


def _instead(plan: Plan, cost: CostModel, chosen: Chosen, wanted: Wanted, limit: int, began: float) -> Plan:
    """The plan of what was chosen, with the rivals of `plan`, which it replaces."""
    told = f"the best plan without a pipeline takes {plan.predicted.iteration_seconds:.3f} s"
    if wanted.objective == "cost" and plan.economy:
        told += f" and trains {plan.economy.tokens_per_dollar:,.0f} tokens a dollar"
    return _planned(dict(plan), told, cost, chosen, wanted, limit, began)


def _planned(
    base: dict[str, Any], told: str, cost: CostModel, chosen: Chosen, wanted: Wanted, limit: int, began: float
) -> Plan:
    """The plan of what was chosen with the other fields of `base`; `told`: of plans without a pipeline."""
    seconds, groups, load = chosen.seconds, chosen.groups, chosen.load
    replayed, train = replay_groups(cost.inputs, groups, cost), cost.train
    world, used, bound = len(cost.devices), _used(groups), pipeline_bound(cost, limit)
    paid = economy(cost, used, seconds, limit, stages=True)
    if wanted.needs_prices:
        bound = priced_bound(bound, least_dollars(cost, limit, stages=True), wanted, paid)
    solver = base["solver"]
    spent = solver.seconds + time.monotonic() - began
    changes = {
        "date": datetime.date.today(),
        "max_groups": wanted.most_groups,
        "groups": groups,
        "predicted": Prediction(
            iteration_seconds=seconds,
            tokens_per_second=train.global_batch_sequences * train.sequence_length / seconds,
            busy_share_per_rank=[share * replayed.seconds / seconds for share in replayed.busy_share(world)],
        ),
        "bound": Bound(iteration_seconds=bound, work_iteration_seconds=bound, exact_over="not solved"),
        "gap": max(0.0, 1 - bound / seconds),
        "one_group": None,
        "memory": replayed.memory(cost),
        "economy": paid,
        "solver": solver.model_copy(update={"status": "feasible", "seconds": spent}),
        "load": load,
        "explanation": binding_of_groups(replayed),
        "notes": [*sources(cost), *_notes(told, cost, groups, wanted), *(load_notes(load) if load else [])],
    }
    return Plan.model_validate({**base, **changes})


def _notes(told: str, cost: CostModel, groups: list[Group], wanted: Wanted) -> Iterator[str]:
    yield f"{'; '.join(_stages(cost, group) for group in groups)}; {told}"
    yield from not_used(cost, _used(groups), why_not_used(wanted))
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
