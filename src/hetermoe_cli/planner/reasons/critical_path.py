"""Critical path of a replay: which task ended last before each task could start, and what each waited for.

Walked back from the end. The path's pieces follow each other without overlap and cover the iteration, so that their
seconds, summed by resource, are the iteration's. Where several predecessors end together the rank's own previous task
is taken, then an earlier transfer on the same port or lane, then what the task reads.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.dataflow import Places, Ranks, dataflow
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.simulator import compute_seconds, replay

SYNCHRONISATION, GATHERING = "synchronisation", "gathering of weights"
_WORDS = {
    Kind.ATTENTION: "attention",
    Kind.PASS: "attention",  # it takes time where it runs an attention stage again
    Kind.EXPERT: "experts",
    Kind.HEAD: "head",
    Kind.OPTIMIZER: "optimizer",
}


class Step(NamedTuple):
    """One piece of the path: `rank` computes (-1: a transfer, or S of all ranks) from the last step's end to `end`."""

    rank: int
    action: Action
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Length of the piece."""
        return self.end - self.start


def critical_path(cost: LayoutCost) -> list[Step]:
    """The steps from the start of the layout's replay to its end."""
    walk = _Walk(cost)
    task: _Task | None = walk.last()
    steps: list[Step] = []
    while task is not None:
        before = walk.before(task)
        steps.append(Step(task.rank, walk.action(task), walk.end(before) if before else 0.0, walk.end(task)))
        task = before
    return steps[::-1]


def shares(cost: LayoutCost, steps: list[Step]) -> dict[str, float]:
    """Share of the path by resource, largest first; they add up to one."""
    seconds: dict[str, float] = defaultdict(float)
    for step in steps:
        if step.seconds > 0:
            seconds[_resource(cost, step)] += step.seconds
    total = sum(seconds.values())
    return {name: value / total for name, value in sorted(seconds.items(), key=lambda item: (-item[1], item[0]))}


def _resource(cost: LayoutCost, step: Step) -> str:
    """`attention of V100`, `NIC of NODE GROUP`, `interconnect of A40`, `synchronisation` or `gathering of weights`."""
    if step.action.kind is Kind.GATHER:
        return GATHERING
    if step.action.kind in (Kind.REDUCE, Kind.SYNCHRONISE):
        return SYNCHRONISATION
    if step.action.is_transfer:
        return _link(cost, cost.slowest_port(step.action))
    return f"{_WORDS[step.action.kind]} of {cost.cost.devices[step.rank].type}"


def _link(cost: LayoutCost, port: int) -> str:
    """The node group whose NIC the port belongs to, or the type of the device whose interconnect it is."""
    devices, cluster = cost.cost.devices, cost.cost.inputs.cluster
    number, inside = cost.cost.network.owner(port)
    if inside:
        return f"interconnect of {devices[number].type}"
    rank = next(device.rank for device in devices if device.nic == number)
    return f"NIC of {cluster.nodes[cluster.group_of_rank[rank]].name}"


class _Task(NamedTuple):
    """A task's number in the dataflow, and the rank that it is looked at on (-1: a transfer)."""

    number: int
    rank: int


class _Walk:
    """The replay's times, and what a task waits for."""

    def __init__(self, cost: LayoutCost) -> None:
        schedule = training_schedule(cost.layout, cost.copies)
        transfers = [cost.transfer(action) for action in schedule.transfers]
        self._flow = dataflow(schedule, cost.layout.layers, [transfer.ports for transfer in transfers])
        seconds = [transfer.seconds for transfer in transfers]
        self._times = replay(self._flow, compute_seconds(self._flow, cost), seconds)
        self._first = len(self._flow.compute)  # number of the first transfer
        self._previous = self._on_ranks()

    def _on_ranks(self) -> list[Ranks]:
        """For each compute task the one before it on each of its ranks, -1 for none."""
        latest = np.full(self._flow.world, -1)
        previous: list[Ranks] = [latest] * self._first
        for number in self._flow.order:
            if number < self._first:
                ranks = self._flow.compute[number].ranks
                previous[number] = latest[ranks]
                latest[ranks] = number
        return previous

    def last(self) -> _Task:
        """A task that ends the iteration."""
        compute = (self._latest(number, None) for number in range(self._first))
        transfers = (_Task(self._first + index, -1) for index in range(len(self._flow.transfers)))
        return max((*compute, *transfers), key=self.end)

    def action(self, task: _Task) -> Action:
        """What the task does."""
        if task.rank < 0:
            return self._flow.transfers[task.number - self._first].action
        return self._flow.compute[task.number].action

    def end(self, task: _Task) -> float:
        """When the task ended."""
        if task.rank < 0:
            return self._times.transfer_ends[task.number - self._first]
        return float(self._times.compute_ends[task.number][self._place(task)])

    def before(self, task: _Task) -> _Task | None:
        """The last of its predecessors; None for a task that nothing precedes."""
        return max(self._predecessors(task), key=self.end, default=None)  # the first one of equals

    def _predecessors(self, task: _Task) -> Iterator[_Task]:
        if task.rank < 0:
            transfer = self._flow.transfers[task.number - self._first]
            yield from (_Task(self._first + earlier, -1) for earlier in sorted(transfer.before))
            yield from (self._latest(maker, places) for maker, places in transfer.makers)
            return
        compute, place = self._flow.compute[task.number], self._place(task)
        everyone = compute.action.kind is Kind.SYNCHRONISE
        for other in range(len(compute.ranks)) if everyone else [place]:
            number = int(self._previous[task.number][other])
            if number >= 0:
                yield _Task(number, int(compute.ranks[other]))
        for index, places in compute.arrivals:
            if everyone or places is None or place in places:
                yield _Task(self._first + index, -1)

    def _latest(self, number: int, places: Places) -> _Task:
        """A compute task on the one of its ranks (at `places`) that ends last."""
        ranks, ends = self._flow.compute[number].ranks, self._times.compute_ends[number]
        chosen = np.arange(len(ranks)) if places is None else places
        return _Task(number, int(ranks[chosen[ends[chosen].argmax()]]))

    def _place(self, task: _Task) -> int:
        return int(np.flatnonzero(self._flow.compute[task.number].ranks == task.rank)[0])
