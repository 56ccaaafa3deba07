"""`hetermoe train`: run a plan with torch.distributed workers on this machine, or this node's part of a larger run."""

import os
import sys
from contextlib import nullcontext
from functools import partial
from json import dumps, loads
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
    MasterAddr,
    MasterPort,
    NodeRank,
    Router,
    TimeScale,
    TraceSteps,
)
from hetermoe_cli.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hetermoe_cli.launch.meeting import Meeting
    from hetermoe_cli.launch.place import Place, PlaceOptions
    from hetermoe_cli.launch.prepare import TrainOptions
    from hetermoe_cli.launch.restarts import Restarts
    from hetermoe_cli.launch.succession import Succession
    from hetermoe_cli.spec.plan import Plan
    from hetermoe_cli.spec.run import RunSpec


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
    _train(found, plan, options, place, restarts, json_output)


def _train(
    plan: "Plan",
    source: Path,
    options: "TrainOptions",
    place_options: "PlaceOptions",
    restarts: "Restarts",
    as_json: bool,
) -> None:
    """This node's part of the run; the leader, node 0 unless it is gone, shows the progress and the summary."""
    from hetermoe_cli.launch.place import find_place
    from hetermoe_cli.launch.prepare import prepare
    from hetermoe_cli.launch.succession import find_succession

    nodes, used = (1, [0]) if options.emulate else (len(plan.inputs.whole.nodes), plan.inputs.node_numbers)
    place = find_place(nodes, place_options, os.environ, sys.argv[1:], used)
    if place is None:
        typer.echo(f"hetermoe: note: {_idle_note(used)}", err=True)
        return
    name = f"hetermoe: node {place.node} of {place.nodes}"
    if (number := used[place.node]) != place.node:
        name += f" (node {number} of the cluster file)"
    check = partial(prepare, plan, source, options, place.node)
    alone = check() if place.nodes == 1 else None  # before torch is loaded
    succession = find_succession(options.folder, used, restarts.replan_after) if place.nodes > 1 else None
    if place.nodes > 1:
        doing = "listens" if place.node == 0 else "looks for node 0"
        typer.echo(f"{name}: {doing} at {place.host}:{place.port}{_in_turn(succession, place)}", err=True)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its store warns where hosts have no names

    from hetermoe_cli.launch.meeting import Meeting

    returns = restarts.left > 0
    with (
        restarts.after_deaths(source, options.folder),
        Meeting(place, str(source.resolve()), returns=returns, succession=succession) as meeting,
    ):
        place = meeting.place
        if place.leader:
            typer.echo(f"{name}: node {place.leader} has taken the place of node 0, at {place.host}", err=True)
        check = partial(check, leads=place.leads)
        lost = meeting.absent(restarts.replan_after)
        if lost:
            told = meeting.word("plan", lambda: dumps(_replan(meeting, plan, lost, options.folder, check)))
            other, host = loads(told)
        else:
            _run(meeting, lambda: alone or check(), options.resume)
    if place.node in lost:
        raise UserError(f"node {used[place.node]} came too late: the others go on without it")
    if lost:
        numbers = ", ".join(str(used[node]) for node in lost)
        typer.echo(f"{name}: goes on without nodes {numbers} of the cluster file, by {other}", err=True)
        meeting.leave()
        restarts.with_plan(source, Path(other), options.folder, host)
    if place.leads:
        from hetermoe_cli.report.run_summary import print_summary

        print_summary(options.folder.resolve(), as_json)
    else:
        typer.echo(f"{name}: done; node {place.leader} shows the summary", err=True)


def _run(meeting: "Meeting", check: "Callable[[], RunSpec]", resumes: bool) -> None:
    """All nodes agree on the run, and workers do it."""
    from hetermoe_cli.launch.agreement import agreed_run
    from hetermoe_cli.launch.local import run_workers
    from hetermoe_cli.launch.progress import Follower

    first, run = meeting.place.leads, agreed_run(meeting, check)
    if resumes and first:
        from hetermoe_cli.runtime.saving import resume_note

        if note := resume_note(run):
            typer.echo(f"hetermoe: note: {note}", err=True)
    with Follower(run) if first else nullcontext():
        run_workers(run, meeting)


def _replan(
    meeting: "Meeting", plan: "Plan", lost: "Sequence[int]", folder: Path, check: "Callable[[], RunSpec]"
) -> tuple[str, str | None]:
    """A plan without lost nodes, and the address of its first node where that is not node 0."""
    from hetermoe_cli.launch.restarts import write_replan

    path, first = write_replan(plan, lost, folder, check)
    return path, meeting.addresses()[first] if first else None


def _in_turn(succession: "Succession | None", place: "Place") -> str:
    """When a node takes the place of node 0, if it does."""
    turn = succession.turn(place.node) if succession and place.node else None
    return "" if turn is None else f", takes its place if nobody has in {turn:.0f} s"


def _idle_note(used: "Sequence[int]") -> str:
    """Why a node has no worker: no error, so that a launch on all nodes of a cluster succeeds."""
    numbers = ", ".join(map(str, used))
    return (
        f"nothing to do on this node: of the cluster file's nodes the plan uses {numbers} only "
        "(pass --node-rank if this is one of them)"
    )
