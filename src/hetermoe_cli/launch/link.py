"""Measure a link: start its workers, on this machine or on two nodes of which this is one, and fit their times."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import IO

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.ends import PeerFailure
from hetermoe_cli.launch.interfaces import socket_environment
from hetermoe_cli.launch.meeting import Meeting
from hetermoe_cli.launch.place import Place
from hetermoe_cli.profiler.network import LinkTask, Samples, Seat, link_record, worker_arguments
from hetermoe_cli.spec.cluster import LinkRecord
from hetermoe_cli.spec.run import LAUNCHER

_HERE = Place()
_SECONDS = 300.0  # for workers to end
_POLL_SECONDS = 0.05


def measure_link(prepare: Callable[[], LinkTask], name: str, place: Place = _HERE) -> LinkRecord | None:
    """The record of a link between two workers of this machine, or between two nodes; None on the second of these.

    `prepare` checks this node's part, so that the other hears of an error. UserError (WORKER_DIED) with a worker's last
    line if it fails, PeerFailure if the other node's did.
    """
    task, samples = None, None  # a node that is interrupted when all is done leaves the meeting without an error
    with Meeting(place) as meeting:
        task = prepare()
        own = json.dumps(asdict(task))
        if meeting.gather("task", own) != own:
            raise UserError(
                f"--nproc-per-node (or the number of CUDA devices), --nics, --device or --quick differ from node "
                f"{place.leader}'s: pass the same on both"
            )
        samples = _run_workers(task, meeting)
    return link_record(task, name, samples) if task and samples else None


def _run_workers(task: LinkTask, meeting: Meeting) -> Samples | None:
    """All workers of this node, which are gone when this returns; the samples of the first one, if it is among them."""
    place = meeting.place
    sides = range(2) if place.nodes == 1 else [place.node]
    seats = [(side, number) for side in sides for number in range(task.width)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", LAUNCHER: str(os.getpid())} | socket_environment(place)
    with ExitStack() as stack:
        outputs, errors = (
            [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in seats] for _ in ("stdout", "stderr")
        )
        workers = [
            _start(
                worker_arguments(meeting.store.host, meeting.store.port, Seat(*seat, device), task),
                outputs[device],
                errors[device],
                variables,
            )
            for device, seat in enumerate(seats)
        ]
        try:
            failed = _wait(workers, meeting.watch)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if failed is not None:
            number, code = failed
            errors[number].seek(0)
            how = "it did not finish in time" if code is None else f"it ended with code {code}"
            last = (errors[number].read().strip().splitlines() or [how])[-1].removeprefix("hetermoe: error: ")
            kind = PeerFailure if code == ExitCode.WORKER_DIED else UserError
            raise kind(f"network worker {number}: {last}", ExitCode.WORKER_DIED)
        outputs[0].seek(0)
        lines = outputs[0].read().strip().splitlines()
    return Samples(*json.loads(lines[-1])) if seats[0] == (0, 0) else None


def _start(
    arguments: Sequence[str], output: IO[str], errors: IO[str], variables: dict[str, str]
) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=errors, text=True, env=variables)


def _wait(workers: Sequence[subprocess.Popen[str]], watch: Callable[[], None]) -> tuple[int, int | None] | None:
    """None once all have ended well, else the number of one that failed, with its code, or of one that is late; not of
    one that only lost another, if there are others. Raises what `watch` does."""
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        codes = [worker.poll() for worker in workers]
        if failed := [(number, code) for number, code in enumerate(codes) if code]:
            return min(failed, key=lambda one: one[1] == ExitCode.WORKER_DIED)
        if None not in codes:
            return None
        watch()
        time.sleep(_POLL_SECONDS)
    return next(number for number, worker in enumerate(workers) if worker.poll() is None), None
