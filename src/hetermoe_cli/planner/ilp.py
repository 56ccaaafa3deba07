"""The MILP of one choice: build, solve, extract.

Classes share variables. Of an uneven class the `largest` model charges every device as the one with most experts: its
makespan is never below the simulator's replay. The `mean` model charges the class's mean where several devices add
up and the largest where one device decides: it is never above any placement's replay, so it gives lower bounds.
Where every class is even, or has one device, both are exact. Where rows go once per device, both take a transfer to
carry as little as it may (`Rates.least_ports`): bounds hold, and what `largest` finds is replayed anyway.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pulp

from hetermoe_cli.planner.choice import DeviceClass
from hetermoe_cli.planner.counts import Counts, from_totals
from hetermoe_cli.planner.graph import TaskGraph
from hetermoe_cli.planner.patterns import Limits
from hetermoe_cli.planner.rates import Rates
from hetermoe_cli.planner.solver import Run, SolverOptions, solve_problem
from hetermoe_cli.schedule.action import Action, Kind

Mode = Literal["largest", "mean"]


@dataclass
class Model:
    """The PuLP problem and its variables by what they mean; times are in units of `unit` seconds, which the makespan
    takes at most: in them, 1.
    """

    unit: float
    rates: Rates
    graph: TaskGraph
    mode: Mode
    limits: Limits
    problem: pulp.LpProblem
    hosted: dict[tuple[int, int], Any] = field(default_factory=dict)  # most on one device of a class, [layer, class]
    spare: dict[tuple[int, int], Any] = field(default_factory=dict)  # devices with one less
    uneven: dict[tuple[int, int], Any] = field(default_factory=dict)
    hosts: dict[tuple[int, int], Any] = field(default_factory=dict)  # whether any device of the class hosts
    all_host: dict[tuple[int, int], Any] = field(default_factory=dict)
    replicated: list[Any] = field(default_factory=list)
    total: list[Any] = field(default_factory=list)  # experts of all layers on the fullest device of a class
    transfer: list[Any] = field(default_factory=list)
    shares: dict[tuple[int, int], Any] = field(default_factory=dict)
    ring: dict[int, Any] = field(default_factory=dict)  # whether a layer's transfers use a port of the all-reduce
    start: list[Any] = field(default_factory=list)
    finish: Any = None
    optimizer: Any = None

    @cached_property
    def transfers(self) -> dict[Action, int]:
        """Node of every dispatch and combine."""
        kinds = (Kind.DISPATCH, Kind.COMBINE)
        return {task.action: node for node, task in enumerate(self.graph.tasks) if task.action.kind in kinds}

    @property
    def layers(self) -> range:
        """Layer numbers."""
        return range(self.rates.layers)

    @property
    def classes(self) -> list[tuple[int, DeviceClass]]:
        """Numbered classes."""
        return list(enumerate(self.rates.classes))

    def flag(self, layer: int, number: int) -> Any:
        """The binary that brings a class's expert task into the dependencies.

        Where the mean is charged, a device that hosts nothing must not make its class's mean later than the answer that
        the others give. In a class that only hosts none does: what is left of the layer before ends before that layer's
        last answer, which this layer's answers follow. On an attending device attention may run longer.
        """
        sure = self.mode == "largest" or not self.rates.classes[number].attends
        return (self.hosts if sure else self.all_host)[layer, number]

    def mean(self, layer: int, number: int) -> Any:
        """Mean hosted experts of a device of the class."""
        count = self.rates.classes[number].count
        hosted = self.hosted[layer, number]
        return hosted if count == 1 else hosted - self.spare[layer, number] * (1 / count)

    def least(self, layer: int, number: int) -> Any:
        """Hosted experts of the device with fewest (in the mean model: on average)."""
        if self.rates.classes[number].count == 1:
            return self.hosted[layer, number]
        if self.mode == "mean":
            return self.mean(layer, number)
        return self.hosted[layer, number] - self.uneven[layer, number]


def build(
    rates: Rates, graph: TaskGraph, horizon: float, mode: Mode = "largest", limits: Limits | None = None
) -> Model:
    """The problem whose makespan is at most `horizon` seconds (infeasible if that cannot be reached).

    Its unit of time is the horizon, so that the solver's absolute tolerances are relative ones.
    """
    from hetermoe_cli.planner import ilp_cuts, ilp_placement, ilp_time

    limits = limits or Limits.of(rates, horizon)
    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    model = Model(horizon, rates.scaled(horizon), graph, mode, limits, problem)
    ilp_placement.variables(model)
    ilp_placement.coverage(model)
    ilp_placement.hosting(model)
    ilp_placement.unevenness(model)
    ilp_placement.totals(model)
    ilp_placement.memory(model)
    ilp_placement.symmetry(model)
    ilp_time.variables(model)
    ilp_time.transfer_lengths(model)
    ilp_time.port_sharing(model)
    ilp_time.ring_sharing(model)
    ilp_time.precedence(model)
    ilp_time.single_tasks(model)
    ilp_time.optimizer_steps(model)
    ilp_time.objective(model)
    ilp_cuts.cuts(model)
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
