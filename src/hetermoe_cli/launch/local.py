"""Start the workers of a run on this machine through torch's elastic agent, and tell how they ended."""

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.ends import PeerFailure
from hetermoe_cli.launch.failures import failure, interrupted_early, unsaved
from hetermoe_cli.launch.interfaces import socket_environment
from hetermoe_cli.launch.place import Place
from hetermoe_cli.runtime.run.recorder import METRICS, STATUS, load_path, trace_path
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.run import LAUNCHER, RunSpec

if TYPE_CHECKING:
    from hetermoe_cli.launch.meeting import Meeting

WORKER = "hetermoe_cli.runtime.worker"
RUN_FILE = "run.yaml"
LOCK_FILE = ".lock"
Trace = tuple[tuple[int, int], ...]
_POLL_SECONDS = 0.5
_SHARED_SECONDS = 10.0  # a network file system may show a new file late
# glibc gives memory at the top of its heap back and takes it again page by page: as experts' rows change from step to
# step, that took up to 15 % of a worker's time. Blocks below 1 GiB stay with the process, in huge pages if the system
# gives them (3 % of a step, 10 to 30 % of what only reads and writes). Who sets these keeps theirs.
MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def command(run: RunSpec) -> list[str]:
    """What every worker executes."""
    return [sys.executable, "-m", WORKER, str(Path(run.folder) / RUN_FILE)]


def environment(run: RunSpec) -> dict[str, str]:
    """Variables that the workers get beside the launcher's own (RANK, WORLD_SIZE, MASTER_ADDR, ...) and those of
    launch.interfaces."""
    kept = {name: os.environ.get(name, value) for name, value in MEMORY.items()}
    return kept | {"OMP_NUM_THREADS": str(run.threads_per_rank)}


@contextlib.contextmanager
def claimed(folder: Path, patience: float = 0.0, before: Trace | None = None) -> Iterator[None]:
    """No other launcher has the folder meanwhile, not on another machine either where the file system locks files.

    UserError if one has it for longer than `patience` seconds, or the run there has gone on since its trace was as
    `before`. The kernel lets go of what a killed launcher had, a network file system some time after its machine died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with (folder / LOCK_FILE).open("w") as file:
        while not (mine := _locked(file)) and time.monotonic() < deadline and before in (None, trace(folder)):
            time.sleep(_POLL_SECONDS)
        if not mine or before not in (None, trace(folder)):
            raise UserError(
                f"{folder}: another `hetermoe train` is at work in it: wait for its end, or name another --run-folder"
            )
        yield


def trace(folder: Path) -> Trace:
    """What changes as a run in the folder goes on: when each of its files was written, and how long it is."""
    found = []
    for path in (folder / name for name in (RUN_FILE, METRICS, STATUS)):
        # opened, as a network file system looks anew then
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            found.append(os.fstat(file.fileno()))
    return tuple([(one.st_mtime_ns, one.st_size) for one in found])


def _locked(file: IO[str]) -> bool:
    """Whether this process has the lock now, or there are none on this file system."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def write_run(run: RunSpec, start: str = "") -> Path:
    """Write run.yaml into the run's folder, which it makes; `start`: a word in it that no other start has.

    Status and traces of an earlier start go: they may be of another plan, with more ranks. So do its loads if it was of
    another: a rank that attended to half of a batch then may now attend to all.
    """
    path = Path(run.folder) / RUN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    loads = [] if _same_groups(run, path) else load_path(path.parent, 0).parent.glob("rank*.npy")
    for old in (path.with_name(STATUS), *trace_path(path.parent, 0).parent.glob("rank*.json"), *loads):
        old.unlink(missing_ok=True)
    header = "Written by `hetermoe train`; workers read this file and nothing else."
    dump(run, path, f"{header}\nStart {start}" if start else header)
    return path


def _same_groups(run: RunSpec, path: Path) -> bool:
    """Whether the start that wrote `path` was of a plan with the same layouts, if any was."""
    with contextlib.suppress(UserError):
        return load(RunSpec, path).plan.groups == run.plan.groups
    return False


def launch(run: RunSpec) -> None:
    """Write run.yaml and run all workers on this machine to the end; errors are those of `run_workers`."""
    from hetermoe_cli.launch.meeting import Meeting

    with Meeting(Place()) as meeting, claimed(Path(run.folder)):
        write_run(run)
        run_workers(run, meeting)


def run_workers(run: RunSpec, meeting: "Meeting") -> None:
    """Run this node's workers to the end; run.yaml is written.

    UserError with the code of the worker that failed first (bad input, or WORKER_DIED with the tail of its log), or
    INTERRUPTED after Ctrl-C; the leader tells whether the state was saved. PeerFailure if another node was the reason.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    from hetermoe_cli.launch.agent import Agent

    folder, place = Path(run.folder), meeting.place
    logs = _logs(folder, place, place.node)
    agent, interrupted, failures = Agent(command(run), len(run.nodes[place.node]), meeting, logs), False, {}
    os.environ |= environment(run) | socket_environment(place) | {LAUNCHER: str(os.getpid())}
    try:
        failures = agent.run().failures
    except SignalException:
        interrupted = True
    signal.signal(signal.SIGINT, signal.SIG_IGN if interrupted else signal.default_int_handler)  # no longer the agent's
    if failures:
        error, tail = failure(logs, failures, agent.killed)
        if tail and (place.nodes == 1 or not isinstance(error, PeerFailure)):
            print("\n".join(tail), file=sys.stderr)
        raise error
    if place.leads:
        _check_status(folder, _logs(folder, place, 0), 0.0 if place.node == 0 else _SHARED_SECONDS)
    elif interrupted:
        raise unsaved(logs) or UserError("interrupted", ExitCode.INTERRUPTED)


def _logs(folder: Path, place: Place, node: int) -> Path:
    """Where the logs of a node's workers are."""
    return folder / "logs" if place.nodes == 1 else folder / "logs" / f"node{node}"


def _check_status(folder: Path, logs: Path, patience: float) -> None:
    """UserError (INTERRUPTED) unless the run has finished. `logs`: of rank 0, which writes the status, on another node
    perhaps, so that it may be seen late."""
    path, deadline = folder / STATUS, time.monotonic() + patience
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    if not path.exists():
        raise unsaved(logs) or interrupted_early(folder)
    status = json.loads(path.read_text())
    if status["state"] == "interrupted":
        raise UserError(
            f"interrupted: saved at step {status['saved_step']}, go on with --resume --run-folder {folder}",
            ExitCode.INTERRUPTED,
        )
