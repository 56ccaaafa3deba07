"""`hetermoe bench`: run several plans in turn and compare their iteration times with the predicted ones."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetermoe_cli.cli import run_options
from hetermoe_cli.cli.run_options import (
    Data,
    DryRun,
    Emulate,
    Executed,
    ExecutedLength,
    ExecutedPrecision,
    Json,
    Router,
    TimeScale,
    TraceSteps,
)

if TYPE_CHECKING:
    from hetermoe_cli.launch.bench import Contender
    from hetermoe_cli.report.bench import Bench

REPORT = "bench.json"


def bench(
    plans: Annotated[list[Path], typer.Argument(help="Plan files; ratios are against the first.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for all runs and bench.json.", show_default="runs/bench-DATE-TIME")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each, every plan runs once.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a run.")] = 8,
    warm_up: Annotated[int, typer.Option(min=0, help="First steps of a run that are not timed.")] = 2,
    data: Data = None,
    router: Router = "learned",
    trace_steps: TraceSteps = 5,
    emulate: Emulate = False,
    executed: Executed = None,
    executed_sequence_length: ExecutedLength = 64,
    executed_precision: ExecutedPrecision = "fp32",
    time_scale: TimeScale = None,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Run several plans in turn (A B C A B C ...): ratios of iteration time with spread, predicted beside measured.

    Every run starts from fresh weights; its folder keeps metrics, loads and traces, no checkpoint.
    """
    from datetime import datetime

    from hetermoe_cli.launch.bench import contenders, in_turn
    from hetermoe_cli.launch.prepare import TrainOptions
    from hetermoe_cli.report.run_summary import print_dry_run, what_runs

    if warm_up >= steps:
        raise typer.BadParameter(f"{warm_up} of {steps} steps: leaves none to time", param_hint="--warm-up")
    options = TrainOptions(
        folder=output or Path("runs") / f"bench-{datetime.now():%Y%m%d-%H%M%S}",
        sources=data or [],
        steps=steps,
        router=router,
        validation_batches=1,
        trace_steps=trace_steps,
        emulate=run_options.emulation(emulate, executed, executed_sequence_length, executed_precision, time_scale),
    )
    found = contenders(plans, options)
    if dry_run:
        order = [run.folder for _, _, run in in_turn(found, repeats)]
        first_round = {contender.name: what_runs(contender.of_round(1)) for contender in found}
        print_dry_run({"order": order, "first_round": first_round}, json_output)
        return
    result = _run(found, options.folder, repeats, warm_up)
    if json_output:
        import json

        print(json.dumps({"output": str(options.folder), **result.as_dict()}))
    else:
        from hetermoe_cli.report.bench import render
        from hetermoe_cli.report.tables import console

        console().print(render(result))
        typer.echo(f"hetermoe: runs and {REPORT} are in {options.folder}", err=True)


def _run(found: "list[Contender]", folder: Path, repeats: int, warm_up: int) -> "Bench":
    """All rounds; bench.json holds those that are complete."""
    import json

    from hetermoe_cli.launch.bench import notes, run_in_turn
    from hetermoe_cli.report.bench import Sample, read_sample, summarise
    from hetermoe_cli.spec.files import write_atomic

    plans = {contender.name: contender.plan for contender in found}
    samples: dict[str, list[Sample]] = {name: [] for name in plans}
    for _, contender, run in run_in_turn(found, repeats, lambda text: typer.echo(text, err=True)):
        samples[contender.name].append(read_sample(Path(run.folder), warm_up))
        if contender is found[-1]:
            result = summarise(plans, samples, warm_up, notes(found))
            write_atomic(folder / REPORT, json.dumps(result.as_dict(), indent=2) + "\n")
    return result
