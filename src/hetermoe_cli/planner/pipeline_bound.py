"""A lower bound on pipelines: every kind of work perfectly divisible over all devices.

Stages may be of one device each and of any type: the head need not be where attention is, nor a sequence's attention
on one device. So each kind of work has shares of its own, in a linear program over the types. Nothing travels.
"""

import pulp

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.solver import SolverOptions, solve_problem
from hetermoe_cli.planner.work import rows_of, type_speeds

SECONDS = 5.0  # for the linear program; it takes milliseconds
SAFE = 1 - 1e-6  # the solver's tolerance must not lift the bound


def pipeline_bound(cost: CostModel, limit: int) -> float:
    """Seconds below which no pipelines can finish an iteration (0 where the program is not solved)."""
    work = {name: _seconds(cost, name, limit) for name in cost.types}
    counts = {name: sum(device.type == name for device in cost.devices) for name in cost.types}
    scale = sum(min(own[kind] for own in work.values()) for kind in next(iter(work.values())))
    problem = pulp.LpProblem("pipelines", pulp.LpMinimize)
    time = problem.add_variable("time", 0)  # in `scale`
    problem.setObjective(time)
    busy = {name: pulp.LpAffineExpression() for name in work}
    for kind in next(iter(work.values())):
        shares = {name: problem.add_variable(f"{kind}{number}", 0) for number, name in enumerate(work)}
        problem.addConstraint(pulp.lpSum(shares.values()) == 1)
        for name, share in shares.items():
            busy[name] += share * (work[name][kind] / scale)
    for name, seconds in busy.items():
        problem.addConstraint(seconds <= counts[name] * time)
    run = solve_problem(problem, SolverOptions(time_limit=SECONDS))
    return run.objective * scale * SAFE if run.status == "optimal" else 0.0


def _seconds(cost: CostModel, name: str, limit: int) -> dict[str, float]:
    """Of all work of each kind on one device of a type, at its best sizes."""
    device, model, batch = cost.types[name], cost.model, cost.train.global_batch_sequences
    sizes = range(1, batch + 1)
    return {
        "attention": model.layers * batch * min(sum(device.attention(n)[:2]) / n for n in sizes),
        "dense": batch * min(sum(cost.dense_cost(device, n)[:2]) / n for n in sizes),
        "head": batch * min(sum(cost.head_cost(device, n)[:2]) / n for n in sizes),
        "step": cost.optimizer_seconds(device, model.dense_parameters),
        "experts": type_speeds(cost, limit)[name].row * rows_of(cost),
    }
