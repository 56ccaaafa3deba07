"""A lower bound on pipelines: every kind of work perfectly divisible over all devices.

Stages may be of one device each and of any type: the head need not be where attention is, nor a sequence's attention
on one device. So each kind of work has shares of its own, in a linear program over the types. Nothing travels.
"""

import pulp

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.bound import SAFE, SECONDS
from hetermoe_cli.planner.solver import SolverOptions, solve_problem
from hetermoe_cli.planner.work import rows_of, type_speeds


def pipeline_bound(cost: CostModel, limit: int) -> float:
    """Seconds below which no pipelines can finish an iteration (0 where the program is not solved)."""
    speeds = type_speeds(cost, limit)
    work = {name: _seconds(cost, name, speed.row) for name, speed in speeds.items()}
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
        problem.addConstraint(seconds <= speeds[name].count * time)
    run = solve_problem(problem, SolverOptions(time_limit=SECONDS))
    return run.objective * scale * SAFE if run.status == "optimal" else 0.0


def _seconds(cost: CostModel, name: str, row: float) -> dict[str, float]:
    """Of all work of each kind on one device of a type, at its best sizes; `row`: of one row in one layer."""
    device, model, batch = cost.types[name], cost.model, cost.train.global_batch_sequences
    sizes = range(1, batch + 1)
    return {
        "attention": model.layers * batch * min(sum(device.attention(n)[:2]) / n for n in sizes),
        "dense": batch * min(sum(cost.dense_cost(device, n)[:2]) / n for n in sizes),
        "head": batch * min(sum(cost.head_cost(device, n)[:2]) / n for n in sizes),
        "step": cost.optimizer_seconds(device, model.dense_parameters),
        "experts": row * rows_of(cost),
    }
