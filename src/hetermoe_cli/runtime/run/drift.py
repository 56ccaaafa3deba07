"""DriftMonitor: what a run measures of its expert load and its devices' speeds, compared now and then with what its
placements were solved for.

The load is that of the whole batch: sequences go to groups at random, so that all of them have the same load to expect,
and a group's own rows would only tell it less surely.
"""

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.measured import MeasuredState
from hetermoe_cli.planner.cluster.replayed import group_cost
from hetermoe_cli.planner.rebalancing.drift import LEAST_FACTOR, Drift, find_drift
from hetermoe_cli.runtime.clocks.clock import Timing
from hetermoe_cli.runtime.machine.mesh import Mesh
from hetermoe_cli.runtime.step.trainer import StepResult, Trainer
from hetermoe_cli.schedule.action import Kind
from hetermoe_cli.spec.load import ExpertLoad
from hetermoe_cli.spec.run import RunSpec

WINDOW_STEPS = 10  # the last ones before a comparison, over which expert rows are averaged; as many before those
TIMED_STEPS = 5  # the last ones, whose tasks are set against their profiled seconds


class Measured(NamedTuple):
    """A comparison: the state of the last steps, from step `first` on, and of those before.

    `news`: whether the drift is worth telling.
    """

    drift: Drift
    news: bool
    now: MeasuredState
    earlier: MeasuredState
    first: int


class DriftMonitor:
    """Keeps the expert rows and compute seconds of the last steps before a comparison.

    Speeds are compared where profiles are measured and tasks are timed where they run: not on CUDA, whose host only
    issues them. Emulated devices are as fast as their profiles, overruns are counted apart.
    """

    def __init__(self, run: RunSpec, mesh: Mesh) -> None:
        self._mesh = mesh
        device = run.plan.inputs.devices()[mesh.process]
        measured = run.emulation is None and run.plan.inputs.profiles[device.type].source == "measured"
        self._timed = measured and mesh.device.type == "cpu"
        self._told: Drift | None = None
        self._last = -1
        self.follow(run)

    def follow(self, run: RunSpec) -> None:
        """Compare with what the placements of `run` were solved for from now on; what was measured so far is
        dropped."""
        self._run, self._told = run, None
        change = run.rebalanced
        self.assumed = (
            MeasuredState(change.expert_load, change.slowdown)
            if change
            else MeasuredState(run.plan.inputs.expert_load, [1.0] * self._mesh.world_size)
        )
        self._restart()

    def _restart(self) -> None:
        self._rows: deque[NDArray[np.float64]] = deque(maxlen=2 * WINDOW_STEPS)
        self._timings: deque[list[Timing]] = deque(maxlen=TIMED_STEPS)

    def watch(self, step: int, result: StepResult, trainer: Trainer) -> None:
        """After every step."""
        self._rows.append(result.expert_rows)
        self._last = step
        if self._timed:
            self._timings.append(trainer.clock.timings)

    def compare(self) -> Measured | None:
        """Collective: what process 0 finds; None on the others."""
        slowdown = torch.zeros(self._mesh.world_size, dtype=torch.float64, device=self._mesh.wire)
        slowdown[self._mesh.process] = self._slowdown()
        self._mesh.all_reduce(slowdown)
        rows, half = np.array(self._rows), len(self._rows) // 2
        self._restart()
        if self._mesh.process:
            return None
        load, earlier = (
            self._load(rows[half:], self._last),
            self._load(rows[: half or 1], self._last - len(rows) + half),
        )
        factors = [max(round(factor, 2), LEAST_FACTOR) for factor in slowdown.tolist()]
        run = self._run
        drift = find_drift(run.plan, run.groups, self.assumed, MeasuredState(load, factors))
        news = drift.is_news_after(self._told)
        self._told = drift if news else self._told
        if not any(departure.layer is None for departure in drift.departures):
            factors = list(self.assumed.slowdown)
        return Measured(
            drift,
            news,
            MeasuredState(load, factors),
            MeasuredState(earlier, factors),
            self._last + 1 - len(rows) + half,
        )

    @staticmethod
    def _load(rows: NDArray[np.float64], last: int) -> ExpertLoad:
        """Mean of rows [steps, layers, experts], of which the latest are those of step `last`."""
        return ExpertLoad(source=f"steps {last + 1 - len(rows)} to {last}", layers=rows.mean(axis=0).tolist())

    def _slowdown(self) -> float:
        """This rank's compute seconds over the profiled ones for the rows that it really had; as assumed if unknown."""
        assumed, rank = self.assumed.slowdown[self._mesh.process], self._mesh.rank
        if not self._timings:
            return assumed
        group = next(g for g in self._run.groups if any(self._mesh.process in ranks for ranks in g.replicas))
        cost = LayoutCost(group_cost(self._run.plan.inputs, group), group.layout)
        measured = profiled = 0.0
        for timing in (timing for step in self._timings for timing in step):
            measured += timing.seconds
            if timing.action.kind is Kind.EXPERT and timing.rows is not None:
                profiled += cost.expert_seconds(rank, timing.action, [float(count) for count in timing.rows])
            else:
                profiled += cost.seconds(rank, timing.action)
        return measured / profiled if profiled else assumed
