"""Emulation of device types and links on one machine: real work and messages, stretched to the cost model's times.

A compute task ends at its target: its start plus the cost model's seconds for the rows that it really received. A task
that did not wait starts at the previous one's target, so that sleep jitter does not add up. A transfer is released
at max(senders ready, its ports and lanes free) + its seconds for the rows really sent: the simulator's own rule.
"""

import time
from pathlib import Path

from hetermoe_cli.cost import CostModel, LayoutCost
from hetermoe_cli.cost.ports import Matrix
from hetermoe_cli.runtime.board import Board
from hetermoe_cli.runtime.clock import Clock, Timing
from hetermoe_cli.runtime.dispatcher import Routing
from hetermoe_cli.runtime.lanes import Handoff
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.schedule import Schedule, inputs
from hetermoe_cli.schedule.zebra import SYNCHRONISE
from hetermoe_cli.spec.run import RunSpec

TOLERANCE_SECONDS = 0.002


class EmulatedClock(Clock):
    """Stretches this rank's tasks.

    `overruns` counts tasks whose real work ended after their target, `overrun_seconds` by how much in all,
    `stretched_seconds` sums the targets' durations.
    """

    def __init__(self, run: RunSpec, schedule: Schedule, rank: int, earlier: "EmulatedClock | None" = None) -> None:
        """Collective: all ranks open the board together. `earlier`: a clock of this run that stops here."""
        super().__init__(rank)
        self._layout = run.layout
        self._model = CostModel(run.plan.inputs)
        self._schedule = schedule
        self._row_scale, self._time_scale = run.row_scale, run.time_scale
        self._board = Board(Path(run.folder) / "board.bin", self._layout, [*schedule.transfers, SYNCHRONISE], rank)
        self._before = self._predecessors()
        self._sends = {action for action in schedule.transfers if rank in schedule.senders[action]}
        self._now = self._reduced = 0.0
        self.tasks = self.overruns = 0
        self.overrun_seconds = self.stretched_seconds = 0.0
        self._ends: dict[Action, float] = {}
        self._cost = LayoutCost(self._model, self._layout)
        if earlier:
            self.go_on(earlier)
            self.tasks, self.overruns = earlier.tasks, earlier.overruns
            self.overrun_seconds, self.stretched_seconds = earlier.overrun_seconds, earlier.stretched_seconds

    def _predecessors(self) -> dict[Action, set[Action]]:
        """Earlier transfers on the same port or lane, as the simulator chains them."""
        ports = LayoutCost(self._model, self._layout)
        last: dict[object, Action] = {}
        result: dict[Action, set[Action]] = {}
        for action in self._schedule.transfers:
            ranks = {*self._schedule.senders[action], *self._schedule.receivers[action]}
            keys = [*ports.transfer(action).ports, *((action.lane, rank) for rank in ranks)]
            result[action] = {last[key] for key in keys if key in last}
            last |= dict.fromkeys(keys, action)
        return result

    def step_start(self) -> float:
        now = time.monotonic()
        if now > self._now + TOLERANCE_SECONDS:  # first step, or the run did something else in between
            self._now = now
        self._cost, self._ends = LayoutCost(self._model, self._layout, self._load), {}
        return self._now

    def _load(self, layer: int, micro_batch: int) -> Matrix:
        scaled: Matrix = self._board.counts(self._step, layer, micro_batch) * self._row_scale
        return scaled

    def compute(self, action: Action, began: float, arrived: float, rows: list[int] | None = None) -> None:
        weights = [a for a in inputs(action, self._layout.layers) if a.kind is Kind.GATHER]
        start = max(self._now, arrived, *(self._ends.get(gather, 0.0) for gather in weights))
        if rows is None:
            seconds = self._cost.seconds(self.rank, action)
        else:
            seconds = self._cost.expert_seconds(self.rank, action, [count * self._row_scale for count in rows])
        self._finish(action, start, start + seconds * self._time_scale)
        self.timings.append(Timing(action, self._now - start, rows))

    def _finish(self, action: Action, start: float, target: float) -> None:
        """Sleep until the target; an overrun moves the clock on."""
        self.tasks += 1
        self.stretched_seconds += target - start
        late = time.monotonic() - target
        if late < 0:
            time.sleep(-late)
        elif late > TOLERANCE_SECONDS:
            self.overruns += 1
            self.overrun_seconds += late
            target += late
        self._now = target
        self._record(action, start, target)

    def counted(self, layer: int, micro_batch: int, routing: Routing) -> None:
        self._board.post_counts(self._step, layer, micro_batch, routing.by_expert)

    def sent(self, action: Action) -> None:
        if action in self._sends:
            self._board.post(self._step, action, self._now)

    def transferred(self, action: Action, handoff: Handoff) -> None:
        handoff.end = self._end(action)
        handoff.start = handoff.end - self._cost.transfer(action).seconds * self._time_scale
        self._record(action, handoff.start, handoff.end)
        if action.kind is Kind.REDUCE:
            self._reduced = handoff.end

    def _end(self, action: Action) -> float:
        """When `action` is released; every rank computes the same from the board."""
        waiting = [action]
        while waiting:
            current = waiting[-1]
            unknown = [earlier for earlier in self._before[current] if earlier not in self._ends]
            if unknown:
                waiting += unknown
                continue
            ready = self._board.wait(self._step, current, self._schedule.senders[current])
            free = max((self._ends[earlier] for earlier in self._before[current]), default=0.0)
            self._ends[current] = max(ready, free) + self._cost.transfer(current).seconds * self._time_scale
            waiting.pop()
        return self._ends[action]

    def synchronising(self) -> None:
        self._board.post(self._step, SYNCHRONISE, max(self._now, self._reduced))

    def synchronised(self, action: Action, began: float) -> None:
        everyone = range(self._layout.world_size)
        start = self._board.wait(self._step, SYNCHRONISE, everyone)
        self._finish(action, start, start + self._cost.synchronise_seconds * self._time_scale)
