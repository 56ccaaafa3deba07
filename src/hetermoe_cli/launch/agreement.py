"""All nodes check, then the leader writes run.yaml, then the others make sure that they read that very file."""

import hashlib
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from hetermoe_cli.errors import UserError
from hetermoe_cli.launch.local import RUN_FILE, claimed, write_run
from hetermoe_cli.launch.meeting import Meeting
from hetermoe_cli.launch.place import Place
from hetermoe_cli.launch.succession import write_hosts
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.run import RunSpec

_SHARED_SECONDS = 30.0  # a network file system may show a new file late
_POLL_SECONDS = 0.5
_OF_LEADER = ("start_step", "rebalanced")  # what only the leader reads from a checkpoint


def agreed_run(meeting: Meeting, prepare: Callable[[], RunSpec]) -> RunSpec:
    """The run of all nodes, once each has checked its part with `prepare`; no worker has been started yet.

    UserError if the run folder is not shared, or another node was started with another plan or other options.
    """
    run = prepare()
    meeting.gather("checked")
    place = meeting.place
    if place.leads:
        meeting.kept.enter_context(claimed(Path(run.folder)))
        if place.nodes > 1:
            write_hosts(Path(run.folder), run.plan.inputs.node_numbers, meeting.addresses())
    written = write_run(run, uuid.uuid4().hex if place.nodes > 1 else "") if place.leads else None
    digest = meeting.gather("run", _digest(written) if written else "-")
    if not written:
        run = _same(run, Path(run.folder) / RUN_FILE, digest, place)
    meeting.gather("agreed")
    return run


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _same(own: RunSpec, path: Path, digest: str, place: Place) -> RunSpec:
    """The run that the leader wrote to `path`; UserError if the file there is another, or `own` is another run."""
    deadline = time.monotonic() + _SHARED_SECONDS
    while _digest(path) != digest:
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}: node {place.node} does not see what node {place.leader} wrote: put --run-folder on a file "
                "system that all nodes share, under one path"
            )
        time.sleep(_POLL_SECONDS)
    found = load(RunSpec, path)
    for field in RunSpec.model_fields:
        if field not in _OF_LEADER and getattr(own, field) != getattr(found, field):
            raise UserError(
                f"{path}: field {field}: node {place.node} was started with another one than node {place.leader}: run "
                "the same command on every node"
            )
    return found
