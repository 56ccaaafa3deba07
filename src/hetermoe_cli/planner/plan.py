"""make_plan: inputs -> Plan, with its prediction, bounds, memory, baselines and reasons."""

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from hetermoe_cli.cost.device import find_table
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.baselines.methods import RIVALS
from hetermoe_cli.planner.baselines.rival import Rival
from hetermoe_cli.planner.bounds.work import work_bound
from hetermoe_cli.planner.by_name.expert_load import load_notes, under_load
from hetermoe_cli.planner.cluster.explained import with_other_orders
from hetermoe_cli.planner.cluster.groups import may_split
from hetermoe_cli.planner.cluster.objective import Wanted, economy
from hetermoe_cli.planner.cluster.plan_groups import bound_of_groups, plan_groups, wants_groups
from hetermoe_cli.planner.pipelines.bound import pipeline_bound
from hetermoe_cli.planner.pipelines.layouts import Setups
from hetermoe_cli.planner.pipelines.plan_pipelines import (
    SHARE,
    SHARE_OF_NODES,
    WORTH,
    PipelineSearch,
    reason_against,
)
from hetermoe_cli.planner.reasons.binding import binding, with_runner_ups
from hetermoe_cli.planner.reasons.explain import does_not_fit, notes
from hetermoe_cli.planner.replay import replay_seconds, typical
from hetermoe_cli.planner.search.outer import Found, search
from hetermoe_cli.planner.search.runner_up import RunnerUp
from hetermoe_cli.planner.solver import SolverOptions, check_available
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.explanation import Explanation
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Assignment, Bound, Group, OneGroup, Plan, Prediction, SolverReport
from hetermoe_cli.spec.profile import AttentionPoint

BESIDE = 0.5  # of the time limit for several groups that nobody asked for, where one is planned first


@dataclass(frozen=True)
class PlanOptions:
    """How to plan."""

    assignment: Assignment = "optimal"
    solver: SolverOptions = field(default_factory=SolverOptions)
    max_micro_batches: int = 16
    explain: bool = False  # find out why other layouts lost
    wanted: Wanted = field(default_factory=Wanted)


def make_plan(
    inputs: Inputs, options: PlanOptions | None = None, progress: Callable[[str], None] = lambda text: None
) -> Plan:
    """The plan for `inputs`. UserError DOES_NOT_FIT if no layout fits, SOLVER if the solver cannot run."""
    options = options or PlanOptions()
    wanted, cost = options.wanted, CostModel(inputs)
    check_available(options.solver.name)
    if options.assignment != "optimal" and wanted != Wanted():
        raise UserError(
            "--objective, --max-cost, --max-groups and --no-pipeline go with --assignment optimal: leave one out"
        )

    pipelines = PipelineSearch(cost, wanted, options.solver, options.max_micro_batches, options.explain)
    try:
        plan, rivals, seconds_left = _without_stages(cost, options, progress)
    except UserError as error:
        may = error.code in (ExitCode.DOES_NOT_FIT, ExitCode.SOLVER) and options.assignment == "optimal"
        alone = pipelines.alone(embed(inputs)) if may else None
        if alone is None:
            raise
        return alone
    return pipelines.instead_of(plan, rivals, seconds_left)


def _without_stages(
    cost: CostModel, options: PlanOptions, progress: Callable[[str], None]
) -> tuple[Plan, Setups, float]:
    """The best plan without pipeline stages, pipelines of the rival pp, and for how many seconds to look at others."""
    wanted, time_limit = options.wanted, options.solver.time_limit
    if options.assignment == "optimal" and wants_groups(cost, wanted):
        aside = 0.0 if reason_against(cost, options.assignment, wanted) else SHARE_OF_NODES * time_limit
        solver = replace(options.solver, time_limit=time_limit - aside)
        return _plan_groups(cost, replace(options, solver=solver), progress), (), aside
    plan, rivals = _plan_one_group(cost, options, progress)
    if options.assignment == "optimal" and wanted.most_groups != 1:
        plan = _one_or_several(plan, cost, options, progress)
    return plan, rivals["pp"].pipelines, SHARE * time_limit


def _one_or_several(plan: Plan, cost: CostModel, options: PlanOptions, progress: Callable[[str], None]) -> Plan:
    """The plan of one group, or several where these are faster."""
    wanted, seconds = options.wanted, plan.predicted.iteration_seconds
    if plan.bound.work_iteration_seconds >= seconds:
        return plan
    groups = _groups_beside(cost, options, progress, seconds)
    if groups and groups.predicted.iteration_seconds < (1 - WORTH) * seconds:
        return _chosen(groups, plan)
    if wanted.most_groups is None:
        return plan  # with the bound and gap of one group
    bound = bound_of_groups(cost, options.max_micro_batches, wanted)
    gap = max(0.0, 1 - bound.iteration_seconds / seconds)
    return plan.model_copy(update={"max_groups": wanted.most_groups, "bound": bound, "gap": gap})


def _plan_groups(cost: CostModel, options: PlanOptions, progress: Callable[[str], None], *, beat: float = inf) -> Plan:
    limit = options.max_micro_batches
    plan = plan_groups(cost, embed(cost.inputs), options.solver, limit, options.wanted, progress, beat=beat)
    told = options.explain and plan.predicted.iteration_seconds < beat
    return with_other_orders(plan, options.solver.time_limit) if told else plan


def _groups_beside(
    cost: CostModel, options: PlanOptions, progress: Callable[[str], None], seconds: float
) -> Plan | None:
    """Several groups where one is planned that takes `seconds`, if any fit: their layouts are fewer."""
    if not may_split(cost, options.max_micro_batches, options.wanted):
        return None
    share = BESIDE if options.wanted.most_groups is None else 1.0
    solver = replace(options.solver, time_limit=share * options.solver.time_limit)
    try:
        return _plan_groups(cost, replace(options, solver=solver), progress, beat=seconds)
    except UserError as error:
        if error.code is not ExitCode.DOES_NOT_FIT:
            raise
        return None


def _chosen(groups: Plan, one: Plan) -> Plan:
    """Several groups that are faster than one; with the rivals of both, and what one takes."""
    rivals = dict(one.baselines)
    for name, rival in groups.baselines.items():
        if (rival.iteration_seconds or inf) < (rivals[name].iteration_seconds or inf):
            rivals[name] = rival
    solver = groups.solver.model_copy(update={"seconds": one.solver.seconds + groups.solver.seconds})
    alone = OneGroup(iteration_seconds=one.predicted.iteration_seconds, bound=one.bound)
    notes = [*groups.notes, f"one group would take {alone.iteration_seconds:.3f} s"]
    return groups.model_copy(update={"baselines": rivals, "solver": solver, "notes": notes, "one_group": alone})


def _plan_one_group(
    cost: CostModel, options: PlanOptions, progress: Callable[[str], None]
) -> tuple[Plan, dict[str, Rival]]:
    """The plan of one group over all devices, and its rivals."""
    inputs, began = cost.inputs, time.monotonic()
    progress("rivals")
    rivals = {name: rival(cost, options.max_micro_batches) for name, rival in RIVALS.items()}
    others = [rival.layout for rival in rivals.values()]
    found, load = search(cost.balanced, options.solver, options.max_micro_batches, others, progress), None
    work = _work_bound(cost, found.layout, options.max_micro_batches)
    if inputs.expert_load:
        progress("placing experts by name")
        found, load = under_load(cost, found, others, options.solver, work)
    own = options.assignment in ("optimal", "pp")  # of pp its stages are put in place of it (PipelineSearch)
    layout = found.layout if own else rivals[options.assignment].layout
    if layout is None:
        raise _no_layout(cost, rivals, options, found)
    layout_cost = LayoutCost(cost, layout)
    trace, seconds = simulate(typical(layout_cost)), replay_seconds(layout_cost)
    world = layout.world_size
    embedded, baselines = embed(inputs), {name: rival.baseline() for name, rival in rivals.items()}
    told = notes(cost, layout, rivals, found)
    plan = Plan(
        date=datetime.date.today(),
        assignment=options.assignment,
        groups=[Group.of(layout, [list(range(world))])],
        predicted=Prediction.of(inputs.train, seconds, trace.busy_share(world), trace.seconds),
        bound=Bound(
            iteration_seconds=found.bound,
            work_iteration_seconds=work,
            exact_over=found.exact_over,
        ),
        gap=max(0.0, 1 - found.bound / seconds),
        memory=[layout_cost.memory(rank) for rank in range(world)],
        baselines=baselines,
        economy=economy(cost, range(world), seconds, options.max_micro_batches, stages=bool(layout.head)),
        solver=SolverReport(
            name=options.solver.name,
            status=found.status,
            seconds=time.monotonic() - began,
            candidates=found.candidates,
            solved=found.solved,
        ),
        load=load,
        explanation=_explanation(layout_cost, seconds, rivals, found, options),
        notes=told + (load_notes(load) if load else []),
        inputs=embedded,
        inputs_sha256=embedded.hashes(),
    )
    return plan, rivals


def _work_bound(cost: CostModel, layout: Layout | None, limit: int) -> float:
    """Of perfectly divisible work, of which a layout with the head apart may do every kind on any device."""
    return pipeline_bound(cost, limit) if layout and layout.head else work_bound(cost, limit)


def _explanation(
    cost: LayoutCost, seconds: float, rivals: dict[str, Rival], found: Found, options: PlanOptions
) -> Explanation:
    """What binds the layout; if wanted, why the runner-ups, the rivals and other orders lost."""
    result = binding(cost)
    if not options.explain:
        return result
    others = [RunnerUp.of(cost.cost, r.layout, r.seconds) for r in rivals.values() if r.layout]
    return with_runner_ups(result, cost, seconds, [*found.runner_ups, *others], options.solver.time_limit)


def _no_layout(cost: CostModel, rivals: dict[str, Rival], options: PlanOptions, found: Found) -> UserError:
    """Why there is no plan: nothing fits, the wanted rival does not, or the time limit came first."""
    if options.assignment in rivals and rivals[options.assignment].seconds == inf:
        reason = f"assignment {options.assignment}: {rivals[options.assignment].reason}"
        return UserError(reason, ExitCode.DOES_NOT_FIT)
    if found.bound < inf:
        return UserError(
            f"solver {options.solver.name}: no plan found within {options.solver.time_limit:g} s, and none ruled out: "
            "raise --time-limit",
            ExitCode.SOLVER,
        )
    return does_not_fit(cost, rivals, options.max_micro_batches)


def embed(inputs: Inputs) -> Inputs:
    """The same inputs with only the kernel tables that the plan reads."""
    profiles = {}
    for name, profile in inputs.profiles.items():
        table = find_table(profile, inputs.model, inputs.train.precision_of(name))
        lengths = sorted({point.sequence_length for point in table.attention})
        wanted = inputs.train.attention_tokens
        near = {
            max((x for x in lengths if x <= wanted), default=lengths[0]),
            min((x for x in lengths if x >= wanted), default=lengths[-1]),
        }
        points: dict[str, Sequence[AttentionPoint]] = {"attention": table.attention, "dense": table.dense}
        kept = {field: [point for point in one if point.sequence_length in near] for field, one in points.items()}
        profiles[name] = profile.model_copy(update={"tables": [table.model_copy(update=kept)]})
    return inputs.model_copy(update={"profiles": profiles})
