"""`hetermoe train`: run a plan with torch.distributed workers on this machine, or this node's part of a larger run."""

import os
import sys
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
    MasterAddr,
    MasterPort,
    NodeRank,
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
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue bit-exactly from the newest checkpoint; begin if there is none.")
    ] = False,
    rebalance: Annotated[
        bool, typer.Option("--rebalance", help="Move experts where the measured load or speeds want them, if it pays.")
    ] = False,
    drift_every: Annotated[
        int, typer.Option(min=0, help="Steps between comparisons of load and speeds with the plan's; 0: never.")
    ] = 20,
    max_restarts: Annotated[
        int,
        typer.Option(min=0, help="Times that workers are started again, from the newest checkpoint, after one died."),
    ] = 0,
    replan_after: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Seconds that nodes may take to come, or come back, before a plan is made without them; "
            "default: the run does not go on without them.",
        ),
    ] = None,
    node_rank: NodeRank = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
    emulate: Emulate = False,
    executed: Executed = None,
    executed_sequence_length: ExecutedLength = 64,
    executed_precision: ExecutedPrecision = "fp32",
    time_scale: TimeScale = None,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Train with the plan's layout: text in, metrics.jsonl, traces and checkpoints out."""
    from hetermoe_cli.launch.node import train_here
    from hetermoe_cli.launch.place import PlaceOptions
    from hetermoe_cli.launch.prepare import TrainOptions, load_plan, prepare
    from hetermoe_cli.launch.restarts import Restarts
    from hetermoe_cli.report.run_summary import print_dry_run, what_runs

    restarts = Restarts(max_restarts, replan_after, sys.argv[1:], dict(os.environ))
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
    found, place = load_plan(plan), PlaceOptions(node_rank, master_addr, master_port)
    if dry_run:
        here = 0 if len(found.inputs.nodes) == 1 else None  # it may be none of several
        print_dry_run(what_runs(prepare(found, plan, options, here), sys.argv[1:], place), json_output)
        return
    if max_restarts and not checkpoint_every:
        typer.echo("hetermoe: note: without --checkpoint-every a restart begins at step 0", err=True)
    train_here(found, plan, options, place, restarts, json_output)
