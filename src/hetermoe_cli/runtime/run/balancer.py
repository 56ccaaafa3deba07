"""Balancer: between steps it tells of drift and, where asked, moves experts to where the measured load wants them."""

import time

from hetermoe_cli.planner.rebalancing.rebalance import UNSTEADY, decide
from hetermoe_cli.runtime.clocks.emulator import EmulatedClock
from hetermoe_cli.runtime.run.drift import DriftMonitor, Measured
from hetermoe_cli.runtime.run.rebalance import move_experts, share_change
from hetermoe_cli.runtime.run.recorder import Recorder
from hetermoe_cli.runtime.step.trainer import StepResult, Trainer
from hetermoe_cli.runtime.transfers.call_check import check
from hetermoe_cli.runtime.transfers.calls import check_agreement, digest
from hetermoe_cli.schedule.lower import training_schedules
from hetermoe_cli.spec.base import sha256
from hetermoe_cli.spec.plan import world_of
from hetermoe_cli.spec.rebalance import Decision, Rebalance
from hetermoe_cli.spec.run import RunSpec


class Balancer:
    """Compares every `run.drift_every` steps. Process 0 decides for all groups, all ranks move."""

    def __init__(self, run: RunSpec, trainer: Trainer, recorder: Recorder) -> None:
        self.run, self._trainer, self._recorder = run, trainer, recorder
        self._monitor = DriftMonitor(run, trainer.mesh)
        self._undecided = False  # because the load was not steady

    def after(self, done: int, result: StepResult) -> None:
        """Collective, after `done` steps of the run, of which this was not the last; `run` says what is in force."""
        self._monitor.watch(done - 1, result, self._trainer)
        if done % self.run.drift_every:
            return
        began, change = time.monotonic(), None
        if measured := self._monitor.compare():
            if measured.news:
                self._tell(measured, done)
            if self.run.rebalance and measured.drift.departures and (measured.news or self._undecided):
                change = self._decide(measured, done)
        if self.run.rebalance and (change := share_change(self._trainer.mesh, change)):
            self._move(change, began)

    def _tell(self, measured: Measured, done: int) -> None:
        drift, first = measured.drift, measured.first
        hint = "; --rebalance moves experts where that pays" if drift.departures and not self.run.rebalance else ""
        message = f"since step {first + 1}: {drift.message()}{hint}"
        self._recorder.event(
            "drift", done - 1, since_step=first, message=message, **drift.model_dump(exclude_none=True)
        )

    def _decide(self, measured: Measured, done: int) -> Rebalance | None:
        run = self.run
        decision = decide(run.plan, run.groups, measured.now, measured.earlier, run.steps - done)
        self._undecided = decision.reason == UNSTEADY
        self._record(done, decision)
        if decision.groups is None:
            return None
        check(world_of(decision.groups), run.precision)
        assert measured.now.load is not None
        return Rebalance(
            step=done,
            groups=decision.groups,
            moved=decision.moved,
            expert_load=measured.now.load,
            slowdown=list(measured.now.slowdown),
            iteration_seconds=decision.after_seconds,
            plan_groups_sha256=sha256(*run.plan.groups),
        )

    def _record(self, done: int, decision: Decision) -> None:
        scale = self.run.time_scale * 1e3
        before, after = decision.before_seconds * scale, decision.after_seconds * scale
        message = f"experts stay: {decision.reason}"
        if decision.groups is not None:
            message = f"rebalanced: {decision.moved} experts move, iteration predicted {before:.0f} -> {after:.0f} ms"
        self._recorder.event(
            "rebalance", done - 1, message=message, **decision.model_dump(exclude={"groups", "reason"})
        )

    def _move(self, change: Rebalance, began: float) -> None:
        trainer, run = self._trainer, self.run.model_copy(update={"rebalanced": change})
        world, schedules = run.world, training_schedules(run.world)
        check_agreement(trainer.mesh.agree(digest(schedules, world, run.precision)))
        move_experts(trainer, run.model, world, trainer.loss_scale.taken(change.step))
        if isinstance(trainer.clock, EmulatedClock):
            process = trainer.mesh.process
            trainer.clock = EmulatedClock(run, schedules[world.seat(process)[0]], process, trainer.clock)
        self.run = run
        self._monitor.follow(run)
        self._recorder.rebalanced(change, time.monotonic() - began)
