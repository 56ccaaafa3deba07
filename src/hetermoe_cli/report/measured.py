"""Measured: the traces of a run, brought to the seconds of its plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hetermoe_cli.errors import UserError
from hetermoe_cli.report.tasks import median_step
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.trace import Trace, read_trace

if TYPE_CHECKING:
    from hetermoe_cli.cost.load import Load
    from hetermoe_cli.spec.run import RunSpec


class Measured(NamedTuple):
    """A run's trace, what to know before comparing it, and the expert load that a prediction should replay."""

    trace: Trace
    notes: list[str]
    load: "Load | None" = None


def read_measured(paths: Sequence[Path], plan: Plan, group: int = 0) -> Measured:
    """Traces of a run folder (RUN/traces/rank*.json) or single trace files, in the plan's (nominal) seconds.

    `plan` is what was trained, with no device left out; of several groups those of `group`, its first replica, on its
    local ranks. UserError if there are none, if the run is of another plan, or if an emulated run's time scale is
    unknown.
    """
    trace, run, notes = read_spans(paths, plan)
    ranks = plan.groups[group].replicas[0]
    trace, (copy, _) = of_ranks(trace, ranks), plan.world.seat(ranks[0])
    load, assumed = None, plan.inputs.expert_load
    if run and (run.router == "learned" or assumed):
        load = _recorded(run, trace, copy)
        if load:
            sent = f"the expert rows that the {run.router} router sent in the median traced step"
            notes.append(f"the prediction replays {sent}")
        else:
            other = "the plan's expert load" if assumed else "a balanced one"
            notes.append(f"the run's router is {run.router}, the prediction assumes {other}")
    return Measured(trace, notes, load)


def read_spans(paths: Sequence[Path], plan: Plan) -> tuple[Trace, "RunSpec | None", list[str]]:
    """As `read_measured`: the trace of all ranks, its run where there is a run.yaml, what to know of its seconds."""
    files = [file for path in paths for file in _files(path)]
    trace = read_trace(files)
    _check_ranks(trace, files[0], plan.world.size)
    run = _run_of(files[0], plan)
    if trace.origin != "emulated":
        return trace, run, []
    if not run:
        raise UserError(f"{files[0]}: emulated, but no run.yaml tells its time scale: name the run folder")
    note = f"emulated seconds are divided by the run's time scale, {run.time_scale:.4g}"
    return _scaled(trace, run.time_scale), run, [note]


def of_ranks(trace: Trace, ranks: Sequence[int]) -> Trace:
    """Only the spans of these ranks, numbered by their places among them."""
    place = {rank: number for number, rank in enumerate(ranks)}
    spans = [span._replace(rank=place[span.rank]) for span in trace.spans if span.rank in place]
    return Trace(trace.origin, spans, trace.starts)


def _recorded(run: "RunSpec", trace: Trace, copy: int) -> "Load | None":
    """A copy's load of the traced step of median length; None if the run folder holds no loads."""
    from hetermoe_cli.report.run_figures import recorded_load

    steps = median_step(trace).step_seconds()
    return recorded_load(run, next(iter(steps)), copy) if steps else None


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted((path / "traces").glob("rank*.json"))
    if not files:
        raise UserError(f"{path}: no traces/rank*.json in this run folder: run `hetermoe train` with --trace-steps")
    return files


def _check_ranks(trace: Trace, file: Path, world_size: int) -> None:
    if not trace.spans:
        raise UserError(f"{file}: the traces hold no task: after its warm-up the run had no step left to trace")
    last = max(span.rank for span in trace.spans)
    if not 0 <= last < world_size:
        raise UserError(f"{file}: the traces hold rank {last}, the plan has ranks 0 to {world_size - 1}")


def _run_of(file: Path, plan: Plan) -> "RunSpec | None":
    """The run that a trace file lies in (RUN/traces/), if its run.yaml is there; UserError if it ran another plan."""
    from hetermoe_cli.spec.files import load
    from hetermoe_cli.spec.run import RunSpec

    path = file.resolve().parent.parent / "run.yaml"
    if not path.is_file():
        return None
    run = load(RunSpec, path)
    if run.groups != run.plan.groups:
        raise UserError(f"{path}: field rebalanced: its experts had moved when it was traced: no plan has that layout")
    if (run.plan.inputs_sha256, run.plan.groups) != (plan.inputs_sha256, plan.groups):
        raise UserError(f"{path}: field plan: another plan than the one given: name the plan that was trained")
    return run


def _scaled(trace: Trace, time_scale: float) -> Trace:
    spans = [span._replace(start=span.start / time_scale, end=span.end / time_scale) for span in trace.spans]
    return Trace(trace.origin, spans, {step: start / time_scale for step, start in trace.starts.items()})
