"""Balancer: between steps it tells of drift and, where asked, moves experts to where the measured load wants them."""

import time

from hetermoe_cli.cost.measured import MeasuredCost
from hetermoe_cli.planner.drift import Drift
from hetermoe_cli.planner.rebalance import decide
from hetermoe_cli.runtime.drift import DriftMonitor
from hetermoe_cli.runtime.emulator import EmulatedClock
from hetermoe_cli.runtime.rebalance import move_experts, share_change
from hetermoe_cli.runtime.recorder import Recorder
from hetermoe_cli.runtime.trainer import StepResult, Trainer
from hetermoe_cli.schedule.lower import training_schedule, validation_schedule
from hetermoe_cli.simulator import check_deadlock
from hetermoe_cli.spec.base import sha256
from hetermoe_cli.spec.load import ExpertLoad
from hetermoe_cli.spec.rebalance import Decision, Rebalance
from hetermoe_cli.spec.run import RunSpec


class Balancer:
    """Compares every `run.drift_every` steps. Rank 0 decides, all ranks move."""

    def __init__(self, run: RunSpec, trainer: Trainer, recorder: Recorder) -> None:
        self.run, self._trainer, self._recorder = run, trainer, recorder
        self._monitor = DriftMonitor(run, trainer.mesh)

    def after(self, done: int, result: StepResult) -> None:
        """Collective, after `done` steps of the run, of which this was not the last; `run` says what is in force."""
        self._monitor.watch(done - 1, result, self._trainer)
        if not self.run.drift_every or done % self.run.drift_every:
            return
        began, change = time.monotonic(), None
        if news := self._monitor.compare():
            drift, load, slowdown, first = news
            self._tell(drift, done, first)
            if self.run.rebalance and drift.departures:
                change = self._decide(done, load, slowdown)
        if self.run.rebalance and (change := share_change(self._trainer.mesh, change)):
            self._move(change, began)

    def _tell(self, drift: Drift, done: int, first: int) -> None:
        hint = "; with --rebalance experts would move" if drift.departures and not self.run.rebalance else ""
        message = f"since step {first + 1}: {drift.message()}{hint}"
        self._recorder.event(
            "drift", done - 1, since_step=first, message=message, **drift.model_dump(exclude_none=True)
        )

    def _decide(self, done: int, load: ExpertLoad, slowdown: list[float]) -> Rebalance | None:
        run, planned = self.run, self.run.plan.layout
        cost = MeasuredCost(run.plan.inputs, load, slowdown)
        copies = run.layout.schedule.dense_state == "replicated"  # else their optimizer states are in shards
        decision = decide(cost, run.layout, planned, run.steps - done, copies=copies)
        self._record(done, decision)
        if decision.placement is None:
            return None
        return Rebalance(
            step=done,
            placement=decision.placement,
            moved=decision.moved,
            expert_load=load,
            slowdown=slowdown,
            iteration_seconds=decision.after_seconds,
            plan_layout_sha256=sha256(planned),
        )

    def _record(self, done: int, decision: Decision) -> None:
        scale = self.run.time_scale * 1e3
        before, after = decision.before_seconds * scale, decision.after_seconds * scale
        message = f"experts stay: {decision.reason}"
        if decision.placement is not None:
            message = f"rebalanced: {decision.moved} experts move, iteration predicted {before:.0f} -> {after:.0f} ms"
        self._recorder.event(
            "rebalance", done - 1, message=message, **decision.model_dump(exclude={"placement", "reason"})
        )

    def _move(self, change: Rebalance, began: float) -> None:
        trainer, run = self._trainer, self.run.model_copy(update={"rebalanced": change})
        for schedule in (training_schedule(run.layout), validation_schedule(run.layout)):
            check_deadlock(schedule, run.layout.layers)
        move_experts(trainer, run.model, run.layout, trainer.loss_scale.taken(change.step))
        if isinstance(trainer.clock, EmulatedClock):
            trainer.clock = EmulatedClock(run, training_schedule(run.layout), trainer.mesh.rank, trainer.clock)
        self.run = run
        self._monitor.follow(run)
        self._recorder.rebalanced(change, time.monotonic() - began)
