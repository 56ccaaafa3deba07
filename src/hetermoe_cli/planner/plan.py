"""make_plan: inputs -> Plan, with its prediction, bounds, memory, baselines and reasons."""

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel, find_table
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.baselines import RIVALS, Rival
from hetermoe_cli.planner.explain import does_not_fit, notes
from hetermoe_cli.planner.search import Found, search
from hetermoe_cli.planner.solver import SolverOptions, check_available
from hetermoe_cli.planner.work import work_bound
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.plan import Assignment, Bound, Inputs, Plan, Prediction, SolverReport


@dataclass(frozen=True)
class PlanOptions:
    """How to plan."""

    assignment: Assignment = "optimal"
    solver: SolverOptions = field(default_factory=SolverOptions)
    max_micro_batches: int = 16


def make_plan(
    inputs: Inputs, options: PlanOptions | None = None, progress: Callable[[str], None] = lambda text: None
) -> Plan:
    """The plan for `inputs`. UserError DOES_NOT_FIT if no layout fits, SOLVER if the solver cannot run."""
    options, began = options or PlanOptions(), time.monotonic()
    check_available(options.solver.name)
    cost = CostModel(inputs)
    progress("rivals")
    rivals = {name: rival(cost, options.max_micro_batches) for name, rival in RIVALS.items()}
    found = search(cost, options.solver, options.max_micro_batches, [r.layout for r in rivals.values()], progress)
    layout = found.layout if options.assignment == "optimal" else rivals[options.assignment].layout
    if layout is None:
        raise _no_layout(cost, rivals, options, found)
    layout_cost = LayoutCost(cost, layout)
    trace = simulate(layout_cost)
    world = layout.world_size
    tokens = inputs.train.global_batch_sequences * inputs.train.sequence_length
    embedded = embed(inputs)
    return Plan(
        date=datetime.date.today(),
        assignment=options.assignment,
        schedule=layout.schedule,
        sequences_per_rank=layout.sequences_per_rank,
        placement=layout.placement,
        predicted=Prediction(
            iteration_seconds=trace.seconds,
            tokens_per_second=tokens / trace.seconds,
            busy_share_per_rank=trace.busy_share(world),
        ),
        bound=Bound(
            iteration_seconds=found.bound,
            work_iteration_seconds=work_bound(cost, options.max_micro_batches),
            exact_over=found.exact_over,
        ),
        gap=max(0.0, 1 - found.bound / trace.seconds),
        memory=[layout_cost.memory(rank) for rank in range(world)],
        baselines={name: rival.baseline() for name, rival in rivals.items()},
        solver=SolverReport(
            name=options.solver.name,
            status=found.status,
            seconds=time.monotonic() - began,
            candidates=found.candidates,
            solved=found.solved,
        ),
        notes=notes(cost, layout, rivals, trace.seconds, found.exact_over),
        inputs=embedded,
        inputs_sha256=embedded.hashes(),
    )


def _no_layout(cost: CostModel, rivals: dict[str, Rival], options: PlanOptions, found: Found) -> UserError:
    """Why there is no plan: nothing fits, the wanted rival does not, or the time limit came first."""
    if options.assignment in rivals:
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
        table = find_table(profile, inputs.model, inputs.train.precision)
        lengths = sorted({point.sequence_length for point in table.attention})
        wanted = inputs.train.sequence_length
        near = {
            max((x for x in lengths if x <= wanted), default=lengths[0]),
            min((x for x in lengths if x >= wanted), default=lengths[-1]),
        }
        attention = [point for point in table.attention if point.sequence_length in near]
        profiles[name] = profile.model_copy(update={"tables": [table.model_copy(update={"attention": attention})]})
    return inputs.model_copy(update={"profiles": profiles})
