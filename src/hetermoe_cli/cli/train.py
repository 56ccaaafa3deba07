"""`hetermoe train`: run a plan with torch.distributed workers on this machine."""

from pathlib import Path
from typing import Annotated

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


def train(
    plan: Annotated[Path, typer.Argument(help="Plan file written by `hetermoe plan`.")],
    run_folder: Annotated[Path | None, typer.Option(help="Run folder; default runs/<plan name>.")] = None,
    data: Data = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default: the plan's.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of Hugging Face weights to begin with; default: drawn from the seed.")
    ] = None,
    router: Router = "learned",
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: only at the end.")] = 0,
    validate_every: Annotated[int, typer.Option(min=0, help="Steps between validations; 0: only at the end.")] = 0,
    validation_batches: Annotated[int, typer.Option(min=1, help="Global batches of a validation.")] = 4,
    trace_steps: TraceSteps = 5,
    resume: Annotated[bool, typer.Option("--resume", help="Continue bit-exactly from the newest checkpoint.")] = False,
    rebalance: Annotated[
        bool, typer.Option("--rebalance", help="Move experts where the measured load or speeds want them, if it pays.")
    ] = False,
    drift_every: Annotated[
        int, typer.Option(min=0, help="Steps between comparisons of load and speeds with the plan's; 0: never.")
    ] = 20,
    emulate: Emulate = False,
    executed: Executed = None,
    executed_sequence_length: ExecutedLength = 64,
    executed_precision: ExecutedPrecision = "fp32",
    time_scale: TimeScale = None,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Train with the plan's layout: text in, metrics.jsonl, traces and checkpoints out."""
    from hetermoe_cli.launch.prepare import TrainOptions, prepare
    from hetermoe_cli.report.run_summary import print_dry_run, print_summary, what_runs

    options = TrainOptions(
        folder=run_folder or Path("runs") / plan.stem,
        sources=data or [],
        steps=steps,
        weights=weights,
        router=router,
        checkpoint_every=checkpoint_every,
        validate_every=validate_every,
        validation_batches=validation_batches,
        trace_steps=trace_steps,
        resume=resume,
        drift_every=drift_every,
        rebalance=rebalance,
        emulate=run_options.emulation(emulate, executed, executed_sequence_length, executed_precision, time_scale),
    )
    run = prepare(plan, options)
    if dry_run:
        print_dry_run(what_runs(run), json_output)
        return

    from hetermoe_cli.launch.local import launch
    from hetermoe_cli.launch.progress import Follower

    if run.resume_from:
        from hetermoe_cli.runtime.saving import resume_note

        if note := resume_note(run):
            typer.echo(f"hetermoe: note: {note}", err=True)
    with Follower(run):
        launch(run)
    print_summary(Path(run.folder), json_output)
