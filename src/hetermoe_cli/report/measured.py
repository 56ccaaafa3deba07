"""Measured: the traces of a run, brought to the seconds of its plan."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hetermoe_cli.errors import UserError
from hetermoe_cli.report.tasks import median_step
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.trace import Trace, read_trace

if TYPE_CHECKING:
    from hetermoe_cli.cost import Load
    from hetermoe_cli.spec.run import RunSpec


class Measured(NamedTuple):
    """A run's trace, what to know before comparing it, and the expert load that a prediction should replay."""

    trace: Trace
    notes: list[str]
    load: "Load | None" = None


def read_measured(paths: Sequence[Path], plan: Plan) -> Measured:
    """Traces of a run folder (RUN/traces/rank*.json) or single trace files, in the plan's (nominal) seconds.

    UserError if there are none, if the run is of another plan, or if an emulated run's time scale is unknown.
    """
    files = [file for path in paths for file in _files(path)]
    trace = read_trace(files)
    _check_ranks(trace, files[0], plan.layout.world_size)
    run = _run_of(files[0], plan)
    notes = []
    if trace.origin == "emulated":
        if not run:
            raise UserError(f"{files[0]}: emulated, but no run.yaml tells its time scale: name the run folder")
        trace = _scaled(trace, run.time_scale)
        notes.append(f"emulated seconds are divided by the run's time scale, {run.time_scale:.4g}")
    load, assumed = None, plan.inputs.expert_load
    if run and (run.router == "learned" or assumed):
        load = _recorded(run, trace)
        if load:
            sent = f"the expert rows that the {run.router} router sent in the median traced step"
            notes.append(f"the prediction replays {sent}")
        else:
            other = "the plan's expert load" if assumed else "a balanced one"
            notes.append(f"the run's router is {run.router}, the prediction assumes {other}")
    return Measured(trace, notes, load)


def _recorded(run: "RunSpec", trace: Trace) -> "Load | None":
    """The load of the traced step of median length; None if the run folder holds no loads."""
    from hetermoe_cli.report.run_figures import recorded_load

    steps = median_step(trace).step_seconds()
    return recorded_load(run, next(iter(steps))) if steps else None


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted((path / "traces").glob("rank*.json"))
    if not files:
        raise UserError(f"{path}: no traces/rank*.json in this run folder: run `hetermoe train` with --trace-steps")
    return files


def _check_ranks(trace: Trace, file: Path, world_size: int) -> None:
    last = max((span.rank for span in trace.spans), default=-1)
    if not 0 <= last < world_size:
        found = f"rank {last}" if trace.spans else "no task"
        raise UserError(f"{file}: the traces hold {found}, the plan has ranks 0 to {world_size - 1}")


def _run_of(file: Path, plan: Plan) -> "RunSpec | None":
    """The run that a trace file lies in (RUN/traces/), if its run.yaml is there; UserError if it ran another plan."""
    from hetermoe_cli.spec.files import load
    from hetermoe_cli.spec.run import RunSpec

    path = file.resolve().parent.parent / "run.yaml"
    if not path.is_file():
        return None
    run = load(RunSpec, path)
    if run.rebalanced and run.layout != plan.layout:
        raise UserError(f"{path}: field rebalanced: its experts had moved when it was traced: no plan has that layout")
    if (run.plan.inputs_sha256, run.plan.layout) != (plan.inputs_sha256, plan.layout):
        raise UserError(f"{path}: field plan: another plan than the one given: name the plan that was trained")
    return run


def _scaled(trace: Trace, time_scale: float) -> Trace:
    spans = [span._replace(start=span.start / time_scale, end=span.end / time_scale) for span in trace.spans]
    return Trace(trace.origin, spans, {step: start / time_scale for step, start in trace.starts.items()})
