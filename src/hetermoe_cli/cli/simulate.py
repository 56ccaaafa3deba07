"""`hetermoe simulate`: replay a plan's iteration, draw it, and compare it with a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetermoe_cli.cli.run_options import Json
from hetermoe_cli.errors import UserError

if TYPE_CHECKING:
    from hetermoe_cli.report.comparison import Comparison
    from hetermoe_cli.report.iteration import Iteration
    from hetermoe_cli.report.measured import Measured
    from hetermoe_cli.spec.plan import Plan
    from hetermoe_cli.trace import Trace

_PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def simulate(
    plan: Annotated[Path, typer.Argument(help="Plan file written by `hetermoe plan`.")],
    trace: Annotated[Path | None, typer.Option(help="Write the iteration here as a Chrome/Perfetto trace.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the iteration here (.png, .svg, .pdf).")] = None,
    placement_picture: Annotated[
        Path | None, typer.Option(help="Draw who hosts which layer's experts here (.png, .svg, .pdf).")
    ] = None,
    schedule: Annotated[
        bool, typer.Option("--schedule", help="Print the schedule's text form instead of the table.")
    ] = False,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Run folder, or trace files (repeat the option), to compare with.")
    ] = None,
    group: Annotated[
        int | None, typer.Option(min=0, help="Only this one of the plan's groups, on its local ranks.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Replay one training iteration of a plan with its profiles: seconds, tokens/s, and what every rank does."""
    _check_suffix(picture, "--picture")
    _check_suffix(placement_picture, "--placement-picture")

    from hetermoe_cli.cost.layout import LayoutCost
    from hetermoe_cli.cost.model import CostModel
    from hetermoe_cli.launch.started import started_plan
    from hetermoe_cli.planner.replay import typical
    from hetermoe_cli.report.comparison import compare
    from hetermoe_cli.report.groups import group_plan, is_whole, replay_plan
    from hetermoe_cli.report.iteration import summarise
    from hetermoe_cli.report.measured import read_measured
    from hetermoe_cli.schedule.lower import training_schedule
    from hetermoe_cli.simulator import simulate as replay
    from hetermoe_cli.spec.files import load, write_atomic
    from hetermoe_cli.spec.plan import Plan

    spec = load(Plan, plan)
    spec.verify(str(plan))
    if group is None and not is_whole(spec):
        if measured or picture or placement_picture or schedule:
            problem = "has several groups" if spec.group_count > 1 else "leaves devices of the cluster out"
            raise UserError(f"{plan}: it {problem}: choose a group with --group 0 to {len(spec.groups) - 1}")
        _simulate_groups(spec, trace, json_output)
        return
    whole, spec = spec, spec if group is None else group_plan(spec, group)
    run = read_measured(measured, started_plan(whole), group or 0) if measured else None
    rows = run.load if run else None
    if group is None:
        model = CostModel(spec.inputs)
        cost = LayoutCost(model, spec.layout, rows) if rows else typical(LayoutCost(model, spec.layout))
    else:
        cost = replay_plan(whole).cost_of(group, rows)
    order = training_schedule(spec.layout, cost.copies)
    predicted = replay(cost, order)
    iteration = summarise(spec, predicted)
    comparison = compare(predicted, run.trace) if run else None
    image = _draw(spec, plan.stem, predicted, iteration.origin, run, picture.suffix[1:]) if picture else None
    placement = _draw_placement(spec, plan.stem, placement_picture.suffix[1:]) if placement_picture else None
    if trace:
        predicted.write(trace)
    for path, content in ((picture, image), (placement_picture, placement)):
        if path and content:
            write_atomic(path, content)
    if json_output:
        _print_json(iteration, comparison, run, str(order) if schedule else None)
    elif schedule:
        print(order, end="")
    else:
        _print_tables(spec, iteration, comparison, run, _notes(spec, run, one_step=group is None))


def _simulate_groups(plan: "Plan", trace: Path | None, json_output: bool) -> None:
    """Every layout of a plan with several groups, each on its local ranks; the trace file has the cluster's ranks."""
    from hetermoe_cli.report.groups import group_plan, merged, replay_plan
    from hetermoe_cli.report.iteration import summarise
    from hetermoe_cli.simulator import simulate as replay

    replayed = replay_plan(plan)
    plans = [group_plan(plan, number) for number in range(len(plan.groups))]
    traces = [replay(replayed.cost_of(number)) for number in range(len(plan.groups))]
    iterations = [summarise(spec, predicted) for spec, predicted in zip(plans, traces, strict=True)]
    if trace:
        merged(plan, traces).write(trace)
    if json_output:
        import json
        from dataclasses import asdict

        found = [
            {"replicas": group.replicas, **asdict(iteration)}
            for group, iteration in zip(plan.groups, iterations, strict=True)
        ]
        print(json.dumps({"iteration_seconds": replayed.seconds, "groups": found}, indent=2))
        return
    for spec, iteration in zip(plans, iterations, strict=True):
        _print_tables(spec, iteration, None, None, [])


def _check_suffix(path: Path | None, option: str) -> None:
    if path and path.suffix not in _PICTURE_SUFFIXES:
        raise typer.BadParameter(f"{path}: must end in {', '.join(_PICTURE_SUFFIXES)}", param_hint=option)


def _draw_placement(plan: "Plan", name: str, file_format: str) -> bytes:
    from hetermoe_cli.report.placement import draw_placement

    return draw_placement(plan, f"{name}: {_headline(plan)}", file_format)


def _draw(plan: "Plan", name: str, predicted: "Trace", origin: str, run: "Measured | None", file_format: str) -> bytes:
    from hetermoe_cli.report.iteration import rank_labels
    from hetermoe_cli.report.timeline import Panel, draw_timeline

    panels = [Panel(predicted, origin)]
    if run:
        panels.append(Panel(run.trace, run.trace.origin))
    return draw_timeline(panels, rank_labels(plan), f"{name}: {_headline(plan)}", file_format)


def _headline(plan: "Plan") -> str:
    from hetermoe_cli.report.tasks import order_of

    return f"{plan.inputs.model.name} on {plan.inputs.cluster.name}, {order_of(plan.layout)}"


def _notes(plan: "Plan", run: "Measured | None", *, one_step: bool) -> list[str]:
    from hetermoe_cli.report.tasks import in_words

    if run:
        return run.notes
    load = plan.inputs.expert_load
    if not load or not load.samples:
        return []
    if not one_step:
        return ["replayed under the mean of the expert load's samples"]
    mean = in_words(plan.predicted.iteration_seconds)
    return [f"of the {len(load.samples)} samples of the expert load it is the one closest to their mean, {mean}"]


def _print_json(
    iteration: "Iteration", comparison: "Comparison | None", run: "Measured | None", schedule: str | None
) -> None:
    import json
    from dataclasses import asdict

    result = asdict(iteration)
    if schedule:
        result["schedule"] = schedule
    if comparison and run:
        result["comparison"] = {**comparison.as_dict(), "notes": run.notes}
    print(json.dumps(result, indent=2))


def _print_tables(
    plan: "Plan", iteration: "Iteration", comparison: "Comparison | None", run: "Measured | None", notes: list[str]
) -> None:
    from hetermoe_cli.report import comparison as comparison_report
    from hetermoe_cli.report import iteration as iteration_report
    from hetermoe_cli.report.tables import console

    output = console()
    output.print(iteration_report.render(iteration, _headline(plan)))
    if comparison and run:
        output.print(comparison_report.render(comparison))
    for note in notes:
        output.print(f"note: {note}")
