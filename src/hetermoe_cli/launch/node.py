"""Node: what one launcher of a run does, from finding its place to the summary."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hetermoe_cli.errors import UserError
from hetermoe_cli.launch.place import Place, PlaceOptions, announce, find_place
from hetermoe_cli.launch.prepare import TrainOptions, prepare
from hetermoe_cli.launch.restarts import Restarts
from hetermoe_cli.launch.succession import Succession, find_succession
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.spec.run import RunSpec

if TYPE_CHECKING:
    from hetermoe_cli.launch.meeting import Meeting


def train_here(
    plan: Plan, source: Path, options: TrainOptions, place_options: PlaceOptions, restarts: Restarts, as_json: bool
) -> None:
    """This node's part of the run; the leader, node 0 unless it is gone, shows the progress and the summary.

    `source`: the plan's file. torch is loaded once a run of a single node has been checked.
    """
    nodes, used = (1, [0]) if options.emulate else (len(plan.inputs.whole.nodes), plan.inputs.node_numbers)
    place = find_place(nodes, place_options, os.environ, sys.argv[1:], used)
    if place is None:
        _say(f"hetermoe: note: {_idle_note(used)}")
        return
    check = partial(prepare, plan, source, options, place.node)
    alone = check() if place.nodes == 1 else None
    succession = find_succession(options.folder, used, restarts.replan_after) if place.nodes > 1 else None
    name = _name(place, used)
    if place.nodes > 1:
        announce(place, name, _in_turn(succession, place))

    from hetermoe_cli.launch.meeting import Meeting

    with (
        restarts.after_deaths(source, options.folder),
        Meeting(place, str(source.resolve()), returns=restarts.left > 0, succession=succession) as meeting,
    ):
        place = meeting.place
        if place.leader:
            _say(f"{name}: node {place.leader} has taken the place of node 0, at {place.host}")
        check = partial(check, leads=place.leads)
        lost = meeting.absent(restarts.replan_after)
        if lost:
            told = meeting.word("plan", lambda: json.dumps(_replan(meeting, plan, lost, options.folder, check)))
            other, host = json.loads(told)
        else:
            _run(meeting, lambda: alone or check(), options.resume)
    if place.node in lost:
        raise UserError(f"node {used[place.node]} came too late: the others go on without it")
    if lost:
        numbers = ", ".join(str(used[node]) for node in lost)
        _say(f"{name}: goes on without nodes {numbers} of the cluster file, by {other}")
        meeting.leave()
        restarts.with_plan(source, Path(other), options.folder, host)
    if place.leads:
        from hetermoe_cli.report.run_summary import print_summary

        print_summary(options.folder.resolve(), as_json)
    else:
        _say(f"{name}: done; node {place.leader} shows the summary")


def _run(meeting: "Meeting", check: Callable[[], RunSpec], resumes: bool) -> None:
    """All nodes agree on the run, and workers do it."""
    from hetermoe_cli.launch.agreement import agreed_run
    from hetermoe_cli.launch.local import run_workers
    from hetermoe_cli.launch.progress import Follower

    first, run = meeting.place.leads, agreed_run(meeting, check)
    if resumes and first:
        from hetermoe_cli.runtime.run.saving import resume_note

        if note := resume_note(run):
            _say(f"hetermoe: note: {note}")
    with Follower(run) if first else nullcontext():
        run_workers(run, meeting)


def _replan(
    meeting: "Meeting", plan: Plan, lost: Sequence[int], folder: Path, check: Callable[[], RunSpec]
) -> tuple[str, str | None]:
    """A plan without lost nodes, and the address of its first node where that is not node 0."""
    from hetermoe_cli.launch.restarts import write_replan

    path, first = write_replan(plan, lost, folder, check)
    return path, meeting.addresses()[first] if first else None


def _name(place: Place, used: Sequence[int]) -> str:
    """Of this launcher in messages."""
    name = f"hetermoe: node {place.node} of {place.nodes}"
    number = used[place.node]
    return name if number == place.node else f"{name} (node {number} of the cluster file)"


def _in_turn(succession: Succession | None, place: Place) -> str:
    """When a node takes the place of node 0, if it does."""
    turn = succession.turn(place.node) if succession and place.node else None
    return "" if turn is None else f", takes its place if nobody has in {turn:.0f} s"


def _idle_note(used: Sequence[int]) -> str:
    """Why a node has no worker: no error, so that a launch on all nodes of a cluster succeeds."""
    numbers = ", ".join(map(str, used))
    return (
        f"nothing to do on this node: of the cluster file's nodes the plan uses {numbers} only "
        "(pass --node-rank if this is one of them)"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
