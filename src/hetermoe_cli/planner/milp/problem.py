"""The MILP of one choice: build, solve, extract.

Classes share variables. Of an uneven class the `largest` model charges every device as the one with most experts: its
makespan is never below the simulator's replay. The `mean` model charges the class's mean where several devices add
up and the largest where one device decides: it is never above any placement's replay, so it gives lower bounds.
Where every class is even, or has one device, both are exact. Where rows go once per device, both take a transfer to
carry as little as it may (`Rates.least_ports`): bounds hold, and what `largest` finds is replayed anyway.
"""

from dataclasses import replace

import numpy as np
import pulp

from hetermoe_cli.planner.bounds.patterns import Limits
from hetermoe_cli.planner.instance.counts import Counts, from_totals
from hetermoe_cli.planner.instance.graph import TaskGraph
from hetermoe_cli.planner.instance.rates import Rates
from hetermoe_cli.planner.milp import placement, times
from hetermoe_cli.planner.milp.cuts import add_cuts
from hetermoe_cli.planner.milp.model import Mode, Model
from hetermoe_cli.planner.solver import Run, SolverOptions, solve_problem


def build(
    rates: Rates, graph: TaskGraph, horizon: float, mode: Mode = "largest", limits: Limits | None = None
) -> Model:
    """The problem whose makespan is at most `horizon` seconds (infeasible if that cannot be reached).

    Its unit of time is the horizon, so that the solver's absolute tolerances are relative ones.
    """
    limits = limits or Limits.of(rates, horizon)
    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    model = Model(horizon, rates.scaled(horizon), graph, mode, limits, problem)
    placement.variables(model)
    placement.coverage(model)
    placement.hosting(model)
    placement.unevenness(model)
    placement.totals(model)
    placement.memory(model)
    placement.symmetry(model)
    times.variables(model)
    times.transfer_lengths(model)
    times.port_sharing(model)
    times.ring_sharing(model)
    times.precedence(model)
    times.single_tasks(model)
    times.optimizer_steps(model)
    times.objective(model)
    add_cuts(model)
    return model


def solve(model: Model, options: SolverOptions) -> Run:
    """Minimise the makespan of a built model; objective and bound in seconds."""
    run = solve_problem(model.problem, options)
    return replace(run, objective=run.objective * model.unit, bound=run.bound * model.unit)


def extract(model: Model) -> Counts:
    """Counts of the solution found, rounded to the integers that they stand for."""
    sizes = model.rates.sizes
    totals = [
        [
            round(model.hosted[layer, c].value()) * size
            - (round(model.spare[layer, c].value()) if (layer, c) in model.spare else 0)
            for c, size in enumerate(sizes)
        ]
        for layer in model.layers
    ]
    replicated = [round(variable.value()) for variable in model.replicated]
    return from_totals(np.array(totals), np.array(replicated), sizes)
