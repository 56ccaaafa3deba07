"""Run tasks: the compute tasks of a run, each with the seconds that it took and those that the cost model gives it.

A task is timed from the moment that its inputs had arrived and the task before it was done, as the simulator times it:
the host's work between two tasks, which no span holds, is part of the later one. All on the rank's own clock. The
predicted seconds are those for the very rows that the task had (the run's recorded loads). With recompute a backward
task holds a second forward: the task's own forward is taken off both sides.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.load import Load, RecordedLoad, balanced_load
from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.cluster.replayed import Replayed, replay_groups
from hetermoe_cli.profiler.refit import KINDS, Sample
from hetermoe_cli.report.measured import of_ranks, read_spans
from hetermoe_cli.report.run_figures import read_run, recorded_load
from hetermoe_cli.report.tasks import category
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.schedule.lower import training_schedules
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout, Span
from hetermoe_cli.spec.run import RunSpec
from hetermoe_cli.trace import Trace, display_name

Place = tuple[str, str]  # device type, kind of task
Samples = dict[Place, list[Sample]]


@dataclass
class CopyTasks:
    """One copy of the model in a run: its trace on its local ranks, and its load in every step (None: balanced)."""

    layout: Layout
    schedule: Schedule
    trace: Trace
    loads: dict[int, RecordedLoad | None]

    @cached_property
    def seconds(self) -> dict[tuple[int, int, Action], float]:
        """Seconds by step, rank and compute task, from ready to done."""
        spans = {(span.step, span.rank, span.name): span for span in self.trace.spans}
        result: dict[tuple[int, int, Action], float] = {}
        for step in self.loads:
            for rank, order in enumerate(self.schedule.compute):
                before: float | None = None  # the first task begins with its span: ranks start when they like
                for action in order:
                    span = spans.get((step, rank, display_name(action)))
                    if span:
                        needed = self.schedule.needs(action, self.layout.layers)
                        sources = [spans.get((step, rank, display_name(source))) for source in needed]
                        ready = max([before or 0.0, *(source.end for source in sources if source)])
                        start = span.start if before is None else min(ready, span.start)
                        result[step, rank, action] = span.end - start
                    before = span.end if span else None
        return result

    def samples(self, costs: Mapping[int, LayoutCost]) -> Iterator[tuple[Place, Sample]]:
        """Every compute task that was traced, against its cost, given by step."""
        for step, cost in costs.items():
            for rank, order in enumerate(self.schedule.compute):
                device = cost.cost.of(rank).type
                for action in order:
                    kind = category(display_name(action))
                    last = action.kind is Kind.HEAD
                    parts = _parts(action, self.layout.spans[-1] if last else self.layout.span_at(action.layer))
                    known = all((step, rank, part) in self.seconds for part in parts)
                    if kind in KINDS and known:
                        predicted = _without(cost.seconds(rank, part) for part in parts)
                        measured = _without(self.seconds[step, rank, part] for part in parts)
                        yield (device, kind), Sample(_size(cost, rank, action), predicted, measured)


@dataclass
class RunTasks:
    """A run, its trace after warm-up, and the copies of the model in it."""

    spec: RunSpec
    trace: Trace
    copies: list[CopyTasks]

    @property
    def steps(self) -> list[int]:
        """Those traced."""
        return sorted(self.copies[0].loads)

    def costs(self, plan: Inputs) -> list[dict[int, LayoutCost]]:
        """Of every copy among the others, but without its waiting for them, the cost of every step, by its load."""
        replayed = replay_groups(plan, self.spec.groups)
        loads = [self._loads(replayed, step) for step in self.steps]
        return [
            {
                step: replayed.cost_of(number, load[copy], waits=False)
                for step, load in zip(self.steps, loads, strict=True)
            }
            for copy, number in enumerate(replayed.copies)
        ]

    def seconds(self, plan: Inputs, steps: Sequence[int]) -> list[float]:
        """The iteration of each step, simulated with its loads."""
        replayed = replay_groups(plan, self.spec.groups)
        return [replayed.seconds_under(self._loads(replayed, step)) for step in steps]

    def _loads(self, replayed: Replayed, step: int) -> list[Load]:
        """Of every copy."""
        pairs = zip(replayed.copies, self.copies, strict=True)
        return [copy.loads[step] or balanced_load(replayed.groups[number].cost, copy.layout) for number, copy in pairs]

    def samples(self, plan: Inputs) -> Samples:
        """Every compute task that was traced, against its cost by `plan`."""
        result: Samples = defaultdict(list)
        for copy, costs in zip(self.copies, self.costs(plan), strict=True):
            for place, sample in copy.samples(costs):
                result[place].append(sample)
        return result


def read_run_tasks(folder: Path, *, allow_emulated: bool = False) -> tuple[RunTasks, list[str]]:
    """Read a run folder and what to know of it, in words; UserError if it is not complete, or emulated."""
    spec = read_run(folder).model_copy(update={"folder": str(folder)})
    spec.plan.verify(str(folder / "run.yaml"))
    if spec.emulation and not allow_emulated:
        raise UserError(
            f"{folder}: an emulated run: its tasks last as long as its profiles say, so there is nothing to learn: "
            "calibrate from a run on the devices themselves (--allow-emulated only checks that nothing moves)"
        )
    trace, _, notes = read_spans([folder], spec.plan)
    world = spec.world
    missing = set(range(world.size)) - {span.rank for span in trace.spans}
    if missing:
        raise UserError(f"{folder}: field traces: nothing of rank {min(missing)}: calibrate from a complete run folder")
    steps = sorted(trace.step_seconds())
    if len(steps) > 1:
        steps = steps[1:]
    else:
        notes.append("a single step was traced: its warm-up is part of the figures (train with more --trace-steps)")
    kept = Trace(trace.origin, [span for span in trace.spans if span.step in steps])
    copies = [
        CopyTasks(
            replica.layout,
            schedule,
            of_ranks(kept, replica.processes),
            {step: _load(spec, step, copy) for step in steps},
        )
        for copy, (replica, schedule) in enumerate(zip(world.replicas, training_schedules(world), strict=True))
    ]
    return RunTasks(spec, kept, copies), notes


def _load(spec: RunSpec, step: int, copy: int) -> RecordedLoad | None:
    load = recorded_load(spec, step, copy)
    if load is None and spec.router == "learned":
        raise UserError(
            f"{spec.folder}: loads/rank*.npy are missing, so the rows that its learned router sent are unknown: "
            "calibrate from a complete run folder"
        )
    return load


def _parts(action: Action, span: Span) -> list[Action]:
    """The task, of a pipeline stage, then what to take off it: with recompute a backward holds a forward too."""
    schedule = span.schedule
    again = {Kind.ATTENTION: schedule.recompute_attention, Kind.EXPERT: schedule.recompute_experts}
    if action.direction is Pass.FORWARD:
        return [action]
    if schedule.sends_again and (action.kind is Kind.ATTENTION or (action.kind is Kind.HEAD and span.has_head)):
        before = action.layer - 1 if action.kind is Kind.ATTENTION else span.end - 1
        held = before in span.layers
        return [action, Action(Kind.ATTENTION, Pass.FORWARD, before, action.micro_batch)] if held else [action]
    return [action, action._replace(direction=Pass.FORWARD)] if again.get(action.kind) else [action]


def _without(seconds: Iterator[float]) -> float:
    return next(seconds) - sum(seconds)


def _size(cost: LayoutCost, rank: int, action: Action) -> float:
    """Size of a task in the units of its curve. Of several experts: rows of the expert that the mean row meets."""
    sequences = cost.layout.sequences_per_rank[rank]
    match action.kind:
        case Kind.EXPERT:
            rows = cost.expert_rows(rank, action.layer, action.micro_batch)
            total = sum(rows)
            return sum(count * count for count in rows) / total if total else 0.0
        case Kind.HEAD:
            return cost.layout.head_sequences(rank) * cost.cost.train.sequence_length
        case Kind.OPTIMIZER:
            return cost.parameters(rank)
    return sequences * cost.cost.documents_per_sequence
