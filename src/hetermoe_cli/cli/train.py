"""`hetermoe train`: run a plan with torch.distributed workers on this machine."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def train(
    plan: Annotated[Path, typer.Argument(help="Plan file written by `hetermoe plan`.")],
    run_folder: Annotated[Path | None, typer.Option(help="Run folder; default runs/<plan name>.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Text file or folder; repeatable. Default: Python's own.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default: the plan's.")] = None,
    router: Annotated[
        Literal["learned", "balanced"], typer.Option(help="balanced: forced equal loads, for timing.")
    ] = "learned",
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: only at the end.")] = 0,
    validate_every: Annotated[int, typer.Option(min=0, help="Steps between validations; 0: only at the end.")] = 0,
    validation_batches: Annotated[int, typer.Option(min=1, help="Global batches of a validation.")] = 4,
    trace_steps: Annotated[int, typer.Option(min=0, help="Steps that every rank traces, after two of warm-up.")] = 5,
    resume: Annotated[bool, typer.Option("--resume", help="Continue bit-exactly from the newest checkpoint.")] = False,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Emulate the plan's devices and links on this machine.")
    ] = False,
    executed: Annotated[
        str | None, typer.Option(help="With --emulate: the model really trained (name or file).")
    ] = None,
    executed_sequence_length: Annotated[int, typer.Option(min=1, help="With --emulate: its sequence length.")] = 64,
    executed_precision: Annotated[
        Literal["fp32", "fp64"], typer.Option(help="With --emulate: its precision.")
    ] = "fp32",
    time_scale: Annotated[
        float | None, typer.Option(help="With --emulate: seconds per nominal second; default: automatic.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print exactly what would run, start nothing.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Train with the plan's layout: text in, metrics.jsonl, traces and checkpoints out."""
    from hetermoe_cli.launch.prepare import EmulateOptions, TrainOptions, prepare
    from hetermoe_cli.report.run_summary import print_dry_run, print_summary
    from hetermoe_cli.spec.model import load_model

    if time_scale is not None and time_scale <= 0:
        raise typer.BadParameter("must be positive", param_hint="--time-scale")
    emulation = None
    if emulate:
        model = load_model(executed) if executed else None
        emulation = EmulateOptions(model, executed_sequence_length, time_scale, executed_precision)
    elif executed or time_scale:
        raise typer.BadParameter("only with --emulate", param_hint="--executed, --time-scale")
    options = TrainOptions(
        folder=run_folder or Path("runs") / plan.stem,
        sources=data or [],
        steps=steps,
        router=router,
        checkpoint_every=checkpoint_every,
        validate_every=validate_every,
        validation_batches=validation_batches,
        trace_steps=trace_steps,
        resume=resume,
        emulate=emulation,
    )
    run = prepare(plan, options)
    if dry_run:
        print_dry_run(run, json_output)
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
