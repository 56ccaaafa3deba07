"""A run's iterations against the simulator with the run's own stage times: what is left is the engine's own.

An iteration is from the end of one synchronisation to the end of the next, on the last rank each time. All ranks meet
there, so that it is a common start, as the simulator assumes one; everything between two iterations (clearing of
gradients, metrics, loading of data) is part of it. In the simulated one the optimizer of the step before comes first.

Stage times, all of them measured in the very iteration that is simulated:
- a compute task's span: from its inputs' arrival on its rank to its end. Work between two tasks is in no span.
- a transfer: from the moment when its last participant began with it (a sender when the lane has the rows, a receiver
  when the lane has nothing before it), to the moment when the last receiver had its rows. Before that a span is
  waiting, which the simulator adds by itself. Time between a task's end and its lane's start is in no stage.
- synchronisation: from the last rank's start to the last rank's end.

All ranks are on one machine, so that their monotonic clocks are one. Simulated with medians of the stage times over the
iterations, an iteration lacks what one task's bad luck costs the others; so that figure is reported beside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.ports import Matrix, TransferCost
from hetermoe_cli.report.run_figures import read_run
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.schedule.zebra import OPTIMIZER, SYNCHRONISE
from hetermoe_cli.simulator import simulate
from hetermoe_cli.trace import Span, Trace, display_name, read_trace

Key = tuple[str, int]  # task, rank
Seconds = dict[Key, float]  # of a compute task on a rank; of a transfer or synchronisation under rank ALL
ALL = -1


class StageTimes(LayoutCost):
    """The layout's ports, with seconds that were measured."""

    def __init__(self, cost: LayoutCost, seconds: Seconds) -> None:
        super().__init__(cost.cost, cost.layout)
        self._seconds = seconds

    def seconds(self, rank: int, action: Action) -> float:
        """Of a compute action on `rank`."""
        return self._seconds[display_name(action), rank]

    def seconds_by_rank(self, action: Action) -> Matrix:
        """[world]; zero where the rank has no part in it."""
        name = display_name(action)
        return np.array([self._seconds.get((name, rank), 0.0) for rank in range(self.layout.world_size)])

    def transfer(self, action: Action) -> TransferCost:
        """Of a transfer."""
        return TransferCost(self._seconds[display_name(action), ALL], super().transfer(action).ports)

    @property
    def synchronise_seconds(self) -> float:
        """From the last rank's start."""
        return self._seconds[display_name(SYNCHRONISE), ALL]


@dataclass(frozen=True)
class Iteration:
    """One measured iteration, in seconds since the synchronisation before it, and its spans in the same seconds."""

    step: int
    seconds: float
    spans: dict[Key, Span]


@dataclass(frozen=True)
class Run:
    """A traced run: its schedule with the optimizer first, what its layout costs by the plan, and its iterations."""

    schedule: Schedule
    cost: LayoutCost
    iterations: list[Iteration]

    @property
    def seconds(self) -> float:
        """Median iteration."""
        return median(iteration.seconds for iteration in self.iterations)


def read(folder: Path) -> Run:
    """A run folder; its first traced step only begins the first iteration."""
    plan = read_run(folder).plan
    layout = plan.layout
    trace = read_trace(sorted((folder / "traces").glob("rank*.json")))
    schedule = optimizer_first(training_schedule(layout))
    return Run(schedule, LayoutCost(CostModel(plan.inputs), layout), iterations(trace))


def optimizer_first(schedule: Schedule) -> Schedule:
    """The same iteration from synchronisation to synchronisation."""
    orders = tuple((OPTIMIZER, *(a for a in order if a.kind is not Kind.OPTIMIZER)) for order in schedule.compute)
    return replace(schedule, compute=orders)


def iterations(trace: Trace) -> list[Iteration]:
    """Every traced step but the first, with the optimizer spans of the step before it."""
    steps = sorted(trace.step_seconds())
    spans: dict[int, list[Span]] = {step: [] for step in steps}
    for span in trace.spans:
        began = trace.starts.get(span.step, 0.0)
        spans[span.step].append(span._replace(start=began + span.start, end=began + span.end))
    names = display_name(OPTIMIZER), display_name(SYNCHRONISE)
    ends = {step: max(s.end for s in spans[step] if s.name == names[1]) for step in steps}
    found = []
    for before, step in pairwise(steps):
        origin = ends[before]
        mine = [s for s in spans[before] if s.name == names[0]] + [s for s in spans[step] if s.name != names[0]]
        shifted = {(s.name, s.rank): s._replace(start=s.start - origin, end=s.end - origin) for s in mine}
        found.append(Iteration(step, ends[step] - origin, shifted))
    return found


def participants(schedule: Schedule, transfer: Action) -> list[int]:
    """Ranks that send or receive in it."""
    return sorted({*schedule.senders[transfer], *schedule.receivers[transfer]})


def stage_seconds(schedule: Schedule, spans: Mapping[Key, Span]) -> Seconds:
    """Stage times of one iteration, as this file's head defines them."""
    seconds: Seconds = {}
    for rank, order in enumerate(schedule.compute):
        for action in order:
            span = spans[display_name(action), rank]
            seconds[span.name, rank] = span.end - span.start
    for transfer in schedule.transfers:
        start, end = under_way(schedule, transfer, spans)
        seconds[display_name(transfer), ALL] = end - start
    name = display_name(SYNCHRONISE)
    last = [spans[name, rank] for rank in range(schedule.world_size)]
    seconds[name, ALL] = max(span.end for span in last) - max(span.start for span in last)
    return seconds


def under_way(schedule: Schedule, transfer: Action, spans: Mapping[Key, Span]) -> tuple[float, float]:
    """From the last participant's start to the last receiver's end."""
    name = display_name(transfer)
    start = max(spans[name, rank].start for rank in participants(schedule, transfer))
    return start, max(spans[name, rank].end for rank in schedule.receivers[transfer])


def simulated(run: Run, seconds: Seconds) -> float:
    """Iteration of the run's schedule with given stage times."""
    return simulate(StageTimes(run.cost, seconds), run.schedule).seconds


def medians(each: Sequence[Seconds]) -> Seconds:
    """Median of every stage."""
    return {key: median(seconds[key] for seconds in each) for key in each[0]}


@dataclass(frozen=True)
class Comparison:
    """Measured over simulated, less one: the median over iterations, each with its own stage times; and the median
    iteration against one with medians of the stage times. `free_transfers`: simulated iteration if transfers took no
    time, over the simulated one, less one: all that communication adds."""

    iteration_seconds: float
    excess: float
    excess_by_medians: float
    free_transfers: float


def compare(run: Run) -> Comparison:
    """A run against its own simulation."""
    each = [stage_seconds(run.schedule, iteration.spans) for iteration in run.iterations]
    times = [simulated(run, seconds) for seconds in each]
    ratios = [iteration.seconds / time for iteration, time in zip(run.iterations, times, strict=True)]
    transfers = {display_name(transfer) for transfer in run.schedule.transfers}
    free = [{key: 0.0 if key[0] in transfers else value for key, value in seconds.items()} for seconds in each]
    without = [simulated(run, seconds) / time for seconds, time in zip(free, times, strict=True)]
    return Comparison(
        iteration_seconds=run.seconds,
        excess=median(ratios) - 1,
        excess_by_medians=run.seconds / simulated(run, medians(each)) - 1,
        free_transfers=median(without) - 1,
    )
