"""Event simulation of pipelines: stages in their own order, messages between neighbours over the cluster's ports."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal, NamedTuple

from hetermoe_cli.cost.ports import Network
from hetermoe_cli.schedule.action import Pass
from hetermoe_cli.schedule.zebra import Windows, steps
from hetermoe_cli.spec.schedule_choice import PassOrder, windows_ahead

Order = Literal["1F1B", "GPipe", "woven"]


Ranks = tuple[int, ...]  # of a stage


class Task(NamedTuple):
    """Forward or backward of a micro-batch, or of a window of them."""

    forward: bool
    micro_batch: int


Step = tuple[Task, ...]  # of a stage: one task, or a forward and a backward woven into each other


@dataclass(frozen=True)
class Pipeline:
    """The ranks of every stage, and seconds of a micro-batch on each. `both`: of two, woven into each other."""

    stages: tuple[Ranks, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    micro_batches: int
    both: tuple[float, ...] = ()

    def seconds(self, stage: int, step: Step) -> float:
        """Of a step."""
        if len(step) > 1:
            return self.both[stage]
        return self.forward[stage] if step[0].forward else self.backward[stage]


def stage_order(order: Order, stage: int, stages: int, micro_batches: int) -> list[Step]:
    """That of a plan's pipeline stage, with windows of one micro-batch."""
    windows = Windows(micro_batches, 1, passes=_passes(order))
    found = steps(_following(order, stage, stages, micro_batches), windows)
    return [tuple(Task(direction is Pass.FORWARD, window.start) for direction, window in step) for step in found]


def in_flight(order: Order, stage: int, stages: int, micro_batches: int) -> int:
    """Micro-batches between forward and backward on a stage, at most."""
    ahead = windows_ahead(_passes(order), _following(order, stage, stages, micro_batches))
    return min(micro_batches, ahead + 1)


def _following(order: Order, stage: int, stages: int, micro_batches: int) -> int:
    """Stages behind a stage; as many as micro-batches send all of these forward first, as GPipe does."""
    return micro_batches if order == "GPipe" else stages - 1 - stage


def _passes(order: Order) -> PassOrder:
    return "woven" if order == "woven" else "in_turn"


def run(network: Network, pipelines: Sequence[Pipeline], order: Order, message_bytes: float) -> float:
    """Seconds until all pipelines have drained; `message_bytes` go from each device to the next stage."""
    state = _Run(network, message_bytes)
    for pipeline in pipelines:
        stages = len(pipeline.stages)
        for stage, ranks in enumerate(pipeline.stages):
            state.left[ranks] = stage_order(order, stage, stages, pipeline.micro_batches)[::-1]
            state.ready[ranks] = set()
        for index in range(pipeline.micro_batches):
            state.push(0.0, pipeline, 0, (Task(True, index),), arrived=True)
    return state.finish()


class _Run:
    """Events in order of time: a task's input is there, or a step is done.

    A message takes its ports in the order in which the messages are ready, one at a time.
    """

    def __init__(self, network: Network, message_bytes: float) -> None:
        self.network, self.bytes = network, message_bytes
        self.free = [0.0] * network.count  # since when, by port
        self.left: dict[Ranks, list[Step]] = {}  # by stage, the next one last
        self.ready: dict[Ranks, set[Task]] = {}
        self.busy: set[Ranks] = set()
        self.events: list[tuple[float, int, Pipeline, int, Step, bool]] = []
        self._count = 0  # keeps events of one time in the order in which they were found

    def push(self, time: float, pipeline: Pipeline, stage: int, step: Step, *, arrived: bool) -> None:
        self._count += 1
        heappush(self.events, (time, self._count, pipeline, stage, step, arrived))

    def finish(self) -> float:
        """Run all events; the time of the last."""
        time = 0.0
        while self.events:
            time, _, pipeline, stage, step, arrived = heappop(self.events)
            ranks = pipeline.stages[stage]
            if arrived:
                self.ready[ranks].update(step)
            else:
                self.busy.remove(ranks)
                for task in step:
                    self._follow(time, pipeline, stage, task)
            self._start(time, pipeline, stage)
        if any(self.left.values()):
            raise AssertionError("pipeline order: some task never starts")
        return time

    def _start(self, time: float, pipeline: Pipeline, stage: int) -> None:
        ranks = pipeline.stages[stage]
        left, ready = self.left[ranks], self.ready[ranks]
        if ranks in self.busy or not left or not ready.issuperset(left[-1]):
            return
        step = left.pop()
        ready.difference_update(step)
        self.busy.add(ranks)
        self.push(time + pipeline.seconds(stage, step), pipeline, stage, step, arrived=False)

    def _follow(self, time: float, pipeline: Pipeline, stage: int, task: Task) -> None:
        """What a task that is done makes possible."""
        if task.forward and stage == len(pipeline.stages) - 1:
            self.push(time, pipeline, stage, (Task(False, task.micro_batch),), arrived=True)
            return
        target = stage + 1 if task.forward else stage - 1
        if target >= 0:
            arrival = self._send(time, pipeline.stages[stage], pipeline.stages[target])
            self.push(arrival, pipeline, target, (task,), arrived=True)

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
