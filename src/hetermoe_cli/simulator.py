"""Simulator: Schedule + costs -> Trace. Without costs it is the deadlock check."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.ports import Matrix
from hetermoe_cli.dataflow import Compute, Dataflow, dataflow
from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.trace import LANES, Span, Trace, display_name, lane_of


class Times(NamedTuple):
    """When the iteration ends, and when tasks start and end: compute tasks on each of their ranks, transfers once."""

    iteration: float
    compute_starts: list[Matrix]
    compute_ends: list[Matrix]
    transfer_starts: list[float]
    transfer_ends: list[float]


def simulate(cost: LayoutCost, schedule: Schedule | None = None) -> "SimulatedTrace":
    """Replay one iteration of the layout (its training schedule unless another is given)."""
    schedule = schedule or training_schedule(cost.layout, cost.copies)
    transfers = [cost.transfer(action) for action in schedule.transfers]
    flow = _flow(schedule, cost.layout.layers, tuple([transfer.ports for transfer in transfers]))
    times = replay(flow, compute_seconds(flow, cost), [transfer.seconds for transfer in transfers])
    return SimulatedTrace(schedule, flow, times)


@lru_cache(maxsize=8)  # layouts that differ in numbers of experts only, and one layout under many loads
def _flow(schedule: Schedule, layers: int, ports: tuple[tuple[int, ...], ...]) -> Dataflow:
    return dataflow(schedule, layers, ports)


def check_deadlock(schedule: Schedule, layers: int) -> None:
    """UserError if some task can never start, or if a transfer has no answer.

    Each rank's transfers run strictly one after another here, as the engine's ordered mode issues them: what passes
    passes for any costs and any sharing of ports.
    """
    for transfer in schedule.transfers:
        if transfer.is_exchange and transfer.answer not in schedule.senders:
            raise UserError(f"schedule: transfer {transfer} has no answer {transfer.answer}")
    dataflow(schedule, layers, [tuple(_participants(schedule, action)) for action in schedule.transfers])


def _participants(schedule: Schedule, action: Action) -> list[int]:
    return sorted({*schedule.senders[action], *schedule.receivers[action]})


def compute_seconds(flow: Dataflow, cost: LayoutCost) -> list[Matrix]:
    """Seconds of every compute task on each of its ranks."""
    return [
        np.full(len(task.ranks), cost.synchronise_seconds)
        if task.action.kind is Kind.SYNCHRONISE
        else cost.seconds_by_rank(task.action).take(task.ranks)
        for task in flow.compute
    ]


def replay(flow: Dataflow, seconds: Sequence[Matrix], transfer_seconds: Sequence[float]) -> Times:
    """The event loop: every task starts when all that it waits for has ended."""
    first, count = len(flow.compute), len(flow.transfers)
    free = np.zeros(flow.world)
    starts, ends = [free] * first, [free] * first
    transfer_starts, transfer_ends = [0.0] * count, [0.0] * count
    for number in flow.order:
        if number < first:
            task = flow.compute[number]
            start = starts[number] = _start(task, free, transfer_ends)
            ends[number] = free[task.ranks] = start + seconds[number]
            continue
        index = number - first
        transfer = flow.transfers[index]
        waits = [transfer_ends[earlier] for earlier in transfer.before]
        for maker, places in transfer.makers:
            made = ends[maker] if places is None else ends[maker].take(places)
            waits.append(float(np.maximum.reduce(made)))
        began = transfer_starts[index] = max(waits, default=0.0)
        transfer_ends[index] = began + transfer_seconds[index]
    iteration = max([float(free.max()), *transfer_ends])
    return Times(iteration, starts, ends, transfer_starts, transfer_ends)


def _start(task: Compute, free: Matrix, transfer_ends: list[float]) -> Matrix:
    """When each of its ranks is done with its task before and has what the task waits for."""
    start = free.take(task.ranks)
    for transfer, places in task.arrivals:
        if places is None:
            np.maximum(start, transfer_ends[transfer], out=start)
        else:
            start[places] = np.maximum(start.take(places), transfer_ends[transfer])
    if task.action.kind is Kind.SYNCHRONISE:
        start[:] = start.max()
    return start


class SimulatedTrace(Trace):
    """The trace of a replay. It keeps vectors over ranks; spans are made when somebody asks for them."""

    def __init__(self, schedule: Schedule, flow: Dataflow, times: Times) -> None:
        super().__init__("simulated")
        self._schedule, self._flow, self._times = schedule, flow, times

    @property
    def spans(self) -> list[Span]:
        """Compute rank by rank in its order, then transfers."""
        return self._all_spans

    @cached_property
    def _all_spans(self) -> list[Span]:
        times = self._times
        spans: list[Span] = []
        for number in self._flow.order:
            if number >= len(self._flow.compute):
                continue
            task = self._flow.compute[number]
            name = display_name(task.action)
            columns = task.ranks, times.compute_starts[number], times.compute_ends[number]
            for rank, start, end in zip(*(column.tolist() for column in columns), strict=True):
                spans.append(Span(rank, LANES[0], name, start, end))
        spans.sort(key=lambda span: span.rank)
        for transfer, start, end in zip(self._flow.transfers, times.transfer_starts, times.transfer_ends, strict=True):
            lane, name = lane_of(transfer.action), display_name(transfer.action)
            spans += [Span(rank, lane, name, start, end) for rank in _participants(self._schedule, transfer.action)]
        return spans

    def step_seconds(self) -> dict[int, float]:
        """End of the iteration."""
        return {0: self._times.iteration} if self._flow.order else {}

    def busy_share(self, world_size: int) -> list[float]:
        """Share of the iteration in which each rank computes; synchronising is not computing."""
        busy = np.zeros(world_size)
        for task, start, end in zip(
            self._flow.compute, self._times.compute_starts, self._times.compute_ends, strict=True
        ):
            if task.action.kind is not Kind.SYNCHRONISE:
                busy[task.ranks] += end - start
        total = self.seconds
        return (busy / total).tolist() if total else [0.0] * world_size
