"""Emulation of device types and links on one machine: real work and messages, stretched to the cost model's times.

A compute task ends at its target: its start plus the cost model's seconds for the rows that it really received. A task
that did not wait starts at the previous one's target, so that sleep jitter does not add up. A transfer is released
at max(senders ready, its ports and lanes free) + its seconds for the rows really sent: the simulator's own rule. What
several groups sum or gather together starts when that is so in all of them.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.load import CountedLoad, Load
from hetermoe_cli.cost.ports import Matrix
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.runtime.clocks.board import Board
from hetermoe_cli.runtime.clocks.clock import Clock, Timing
from hetermoe_cli.runtime.transfers.dispatcher import Routing
from hetermoe_cli.runtime.transfers.lanes import Handoff
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.lower import training_schedules
from hetermoe_cli.schedule.schedule import Schedule, is_of_all
from hetermoe_cli.schedule.zebra import SYNCHRONISE
from hetermoe_cli.spec.run import RunSpec
from hetermoe_cli.spec.world import World

TOLERANCE_SECONDS = 0.002


class EmulatedClock(Clock):
    """Stretches this rank's tasks.

    `overruns` counts tasks whose real work ended after their target, `overrun_seconds` by how much in all,
    `stretched_seconds` sums the targets' durations.
    """

    waits = True

    def __init__(self, run: RunSpec, schedule: Schedule, rank: int, earlier: "EmulatedClock | None" = None) -> None:
        """Collective: all ranks open the board together. `schedule`: that of this group, of which `rank`, the process,
        is a member. `earlier`: a clock of this run that stops here."""
        super().__init__(rank)
        self._world = run.world
        copy, self._local = self._world.seat(rank)
        self._processes = list(self._world.replicas[copy].processes)
        self._layout = self._world.replicas[copy].layout
        self._schedule, self._cost_of = schedule, _costs(run, copy)
        self._row_scale, self._time_scale = run.row_scale, run.time_scale
        self._board = Board(Path(run.folder) / "board.bin", self._world, _posted(self._world), rank)
        self._before = self._predecessors()
        self._sends = {action for action in schedule.transfers if self._local in schedule.senders[action]}
        self._now = self._reduced = 0.0
        self.tasks = self.overruns = 0
        self.overrun_seconds = self.stretched_seconds = 0.0
        self._ends: dict[Action, float] = {}
        self._cost = self._cost_of(None)
        if earlier:
            self.go_on(earlier)
            self.tasks, self.overruns = earlier.tasks, earlier.overruns
            self.overrun_seconds, self.stretched_seconds = earlier.overrun_seconds, earlier.stretched_seconds

    def _predecessors(self) -> dict[Action, set[Action]]:
        """Earlier transfers on the same port or lane, as the simulator chains them."""
        ports = self._cost_of(None)
        last: dict[object, Action] = {}
        result: dict[Action, set[Action]] = {}
        for action in self._schedule.transfers:
            ends = (self._schedule.senders[action], self._schedule.receivers[action])
            lanes = zip(self._schedule.lanes_of(action), ends, strict=True)
            keys = [*ports.transfer(action).ports, *{(lane, rank): None for lane, end in lanes for rank in end}]
            result[action] = {last[key] for key in keys if key in last}
            last |= dict.fromkeys(keys, action)
        return result

    def step_start(self) -> float:
        now = time.monotonic()
        if now > self._now + TOLERANCE_SECONDS:  # first step, or the run did something else in between
            self._now = now
        self._cost, self._ends = self._cost_of(CountedLoad(self._by_expert, self._by_rank)), {}
        return self._now

    def _by_expert(self, layer: int, micro_batch: int) -> Matrix:
        return self._counted(layer, micro_batch)[:, : self._world.experts]

    def _by_rank(self, layer: int, micro_batch: int) -> Matrix:
        return self._counted(layer, micro_batch)[:, self._world.experts :][:, : len(self._processes)]

    def _counted(self, layer: int, micro_batch: int) -> Matrix:
        scaled: Matrix = self._board.counts(self._step, layer, micro_batch)[self._processes] * self._row_scale
        return scaled

    def compute(self, action: Action, began: float, arrived: float, rows: list[int] | None = None) -> None:
        weights = [a for a in self._schedule.needs(action, self._world.layers) if a.kind is Kind.GATHER]
        start = max(self._now, arrived, *(self._ends.get(gather, 0.0) for gather in weights))
        if rows is None:
            seconds = self._cost.seconds(self._local, action)
        else:
            seconds = self._cost.expert_seconds(self._local, action, [count * self._row_scale for count in rows])
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
        self._span(action, start, target)

    def counted(self, layer: int, micro_batch: int, routing: Routing) -> None:
        self._board.post_counts(self._step, layer, micro_batch, routing.by_expert, routing.sizes)

    def sent(self, action: Action) -> None:
        if action in self._sends:
            self._board.post(self._step, action, self._now)

    def transferred(self, action: Action, handoff: Handoff) -> None:
        handoff.end = self._end(action)
        handoff.start = handoff.end - self._cost.transfer(action).seconds * self._time_scale
        self._span(action, handoff.start, handoff.end)
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
            senders = [self._processes[rank] for rank in self._schedule.senders[current]]
            ready = self._board.wait(self._step, current, senders)
            free = max((self._ends[earlier] for earlier in self._before[current]), default=0.0)
            start = self._start(current, max(ready, free))
            self._ends[current] = start + self._cost.transfer(current).seconds * self._time_scale
            waiting.pop()
        return self._ends[action]

    def _start(self, action: Action, here: float) -> float:
        """When `action` starts that this group could start at `here`: what all groups do together, in all of them."""
        if not is_of_all(action, self._layout, [replica.layout for replica in self._world.replicas]):
            return here
        together = 2 * action.layer + (action.kind is Kind.GATHER)
        self._board.post(self._step, together, here)
        first = [replica.attending_at(action.layer)[0] for replica in self._world.replicas]
        return self._board.wait(self._step, together, first)

    def synchronising(self) -> None:
        self._board.post(self._step, SYNCHRONISE, max(self._now, self._reduced))

    def synchronised(self, action: Action, began: float) -> None:
        start = self._board.wait(self._step, SYNCHRONISE, range(self._world.size))
        self._finish(action, start, start + self._cost.synchronise_seconds * self._time_scale)


def _costs(run: RunSpec, copy: int) -> Callable[[Load | None], LayoutCost]:
    """Costs of one copy of the model under a load, without its waiting for others."""
    replayed = replay_groups(run.plan.inputs, run.groups)
    return partial(replayed.cost_of, replayed.copies[copy], waits=False)


def _posted(world: World) -> list[Action | int]:
    """What ranks post: when they are ready for transfers and for S, and when their group could start a layer's sum, or
    gather its new weights."""
    transfers = [transfer for schedule in training_schedules(world) for transfer in schedule.transfers]
    return [*transfers, SYNCHRONISE, *range(2 * (world.layers + 1))]
