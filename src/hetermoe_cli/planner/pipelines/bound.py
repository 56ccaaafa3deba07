"""A lower bound on pipelines: every kind of work perfectly divisible over all devices.

Stages may be of one device each and of any type: the head need not be where attention is, nor a sequence's attention
on one device. So each kind of work has shares of its own, in a linear program over the types. Nothing travels.
"""

from collections import Counter

import pulp

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.bounds.work import work_by_kind
from hetermoe_cli.planner.cluster.bound import SAFE, SECONDS
from hetermoe_cli.planner.solver import SolverOptions, solve_problem


def pipeline_bound(cost: CostModel, limit: int) -> float:
    """Seconds below which no pipelines can finish an iteration (0 where the program is not solved)."""
    work = work_by_kind(cost, limit)
    counts = Counter(device.type for device in cost.devices)
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
