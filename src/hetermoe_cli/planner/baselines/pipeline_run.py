"""Event simulation of pipelines: stages in their own order, messages between neighbours over the cluster's ports."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal, NamedTuple

from hetermoe_cli.cost.ports import Network

Order = Literal["1F1B", "GPipe"]


Ranks = tuple[int, ...]  # of a stage


class Task(NamedTuple):
    """Forward or backward of a micro-batch."""

    forward: bool
    micro_batch: int


@dataclass(frozen=True)
class Pipeline:
    """The ranks of every stage, and seconds of a micro-batch on each."""

    stages: tuple[Ranks, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    micro_batches: int


def stage_order(order: Order, stage: int, stages: int, micro_batches: int) -> list[Task]:
    """GPipe runs all forwards first, 1F1B as many as stages follow, then a forward and a backward in turn."""
    warm = micro_batches if order == "GPipe" else min(micro_batches, stages - 1 - stage)
    result = [Task(True, index) for index in range(warm)]
    for index in range(micro_batches):
        if warm + index < micro_batches:
            result.append(Task(True, warm + index))
        result.append(Task(False, index))
    return result


def in_flight(order: Order, stage: int, stages: int, micro_batches: int) -> int:
    """Micro-batches between forward and backward on a stage, at most."""
    return micro_batches if order == "GPipe" else min(micro_batches, stages - stage)


def run(network: Network, pipelines: Sequence[Pipeline], order: Order, message_bytes: float) -> float:
    """Seconds until all pipelines have drained; `message_bytes` go from each device to the next stage."""
    state = _Run(network, message_bytes)
    for pipeline in pipelines:
        stages = len(pipeline.stages)
        for stage, ranks in enumerate(pipeline.stages):
            state.left[ranks] = stage_order(order, stage, stages, pipeline.micro_batches)[::-1]
            state.ready[ranks] = set()
        for index in range(pipeline.micro_batches):
            state.push(0.0, pipeline, 0, Task(True, index), arrived=True)
    return state.finish()


class _Run:
    """Events in order of time: a task's input is there, or a task is done.

    A message takes its ports in the order in which the messages are ready, one at a time.
    """

    def __init__(self, network: Network, message_bytes: float) -> None:
        self.network, self.bytes = network, message_bytes
        self.free = [0.0] * network.count  # since when, by port
        self.left: dict[Ranks, list[Task]] = {}  # by stage, the next task last
        self.ready: dict[Ranks, set[Task]] = {}
        self.busy: set[Ranks] = set()
        self.events: list[tuple[float, int, Pipeline, int, Task, bool]] = []
        self._count = 0  # keeps events of one time in the order in which they were found

    def push(self, time: float, pipeline: Pipeline, stage: int, task: Task, *, arrived: bool) -> None:
        self._count += 1
        heappush(self.events, (time, self._count, pipeline, stage, task, arrived))

    def finish(self) -> float:
        """Run all events; the time of the last."""
        time = 0.0
        while self.events:
            time, _, pipeline, stage, task, arrived = heappop(self.events)
            ranks = pipeline.stages[stage]
            if arrived:
                self.ready[ranks].add(task)
            else:
                self.busy.remove(ranks)
                self._follow(time, pipeline, stage, task)
            self._start(time, pipeline, stage)
        if any(self.left.values()):
            raise AssertionError("pipeline order: some task never starts")
        return time

    def _start(self, time: float, pipeline: Pipeline, stage: int) -> None:
        ranks = pipeline.stages[stage]
        left, ready = self.left[ranks], self.ready[ranks]
        if ranks in self.busy or not left or left[-1] not in ready:
            return
        task = left.pop()
        ready.remove(task)
        self.busy.add(ranks)
        seconds = pipeline.forward[stage] if task.forward else pipeline.backward[stage]
        self.push(time + seconds, pipeline, stage, task, arrived=False)

    def _follow(self, time: float, pipeline: Pipeline, stage: int, task: Task) -> None:
        """What a task that is done makes possible."""
        if task.forward and stage == len(pipeline.stages) - 1:
            self.push(time, pipeline, stage, Task(False, task.micro_batch), arrived=True)
            return
        target = stage + 1 if task.forward else stage - 1
        if target >= 0:
            arrival = self._send(time, pipeline.stages[stage], pipeline.stages[target])
            self.push(arrival, pipeline, target, task, arrived=True)

    def _send(self, time: float, sources: Ranks, targets: Ranks) -> float:
        """Each device sends its part to the one of equal place; all parts travel together."""
        load: dict[int, float] = {}
        for source, target in zip(sources, targets, strict=True):
            for port in (int(self.network.out_port[source, target]), int(self.network.in_port[source, target])):
                load[port] = load.get(port, 0.0) + self.bytes
        seconds = 0.0
        for port, size in load.items():
            byte_seconds, latency = self.network.link(port)
            seconds = max(seconds, size * byte_seconds + latency)
        end = max(time, *(self.free[port] for port in load)) + seconds
        for port in load:
            self.free[port] = end
        return end
