"""Start the workers of a run on this machine through torch's elastic launcher, and tell how they ended."""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.runtime.recorder import CHECKPOINTS, STATUS
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.run import RunSpec

WORKER = "hetermoe_cli.runtime.worker"
RUN_FILE = "run.yaml"
_SHUTDOWN_SECONDS = 600  # after Ctrl-C: the step in progress, and the checkpoint
_LOG_TAIL_LINES = 15
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
    """Variables that the workers get beside the launcher's own (RANK, WORLD_SIZE, MASTER_ADDR, ...)."""
    kept = {name: os.environ.get(name, value) for name, value in MEMORY.items()}
    return kept | {
        "OMP_NUM_THREADS": str(run.threads_per_rank),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SECONDS),
    }


def launch(run: RunSpec) -> dict[str, Any]:
    """Run all workers to the end; the run's status.

    UserError with the code of the worker that failed first (bad input, or WORKER_DIED with the tail of its log), or
    INTERRUPTED after Ctrl-C, told whether the state was saved.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from hetermoe_cli.launch import rendezvous

    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATUS).unlink(missing_ok=True)
    dump(run, folder / RUN_FILE, "Written by `hetermoe train`; workers read this file and nothing else.")
    os.environ |= environment(run)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # its warnings repeat what is said here
            logging.getLogger(name).setLevel(logging.CRITICAL)
    rendezvous.register()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=run.world.size,
        run_id="run",
        rdzv_backend=rendezvous.BACKEND,
        rdzv_endpoint="127.0.0.1",
        max_restarts=0,
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL),
    )
    python, *arguments = command(run)
    try:
        elastic_launch(config, python)(*arguments)
    except SignalException:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ChildFailedError as error:
        raise _failure(folder, error.failures) from error
    return _status(folder)


def _status(folder: Path) -> dict[str, Any]:
    path = folder / STATUS
    if not path.exists():
        raise _unsaved(folder)
    status: dict[str, Any] = json.loads(path.read_text())
    if status["state"] == "interrupted":
        raise UserError(
            f"interrupted: saved at step {status['saved_step']}, go on with --resume --run-folder {folder}",
            ExitCode.INTERRUPTED,
        )
    return status


def _unsaved(folder: Path) -> UserError:
    """An interrupted run without a last word: the save failed, or there was nothing to save yet."""
    from hetermoe_cli.model.checkpoint import find_latest

    for log in _logs(folder):
        for line in _errors(log):
            if not line.startswith(("lost a peer", "the launcher is gone")):
                return UserError(f"interrupted, and not saved: {line}")
    latest = find_latest(folder / CHECKPOINTS)
    found = f"the newest checkpoint is {latest.name}" if latest else "before anything was saved"
    return UserError(f"interrupted: {found}; logs in {folder / 'logs'}", ExitCode.INTERRUPTED)


def _failure(folder: Path, failures: dict[int, Any]) -> UserError:
    """The worker that failed first, with the tail of its log."""
    followers = (ExitCode.WORKER_DIED, -signal.SIGTERM)  # lost a peer, or were ended by the launcher
    told = (ExitCode.BAD_INPUT, ExitCode.DOES_NOT_FIT)
    first = min(failures.values(), key=lambda f: (f.exitcode in followers, f.exitcode not in told, f.local_rank))
    log = next(iter(_logs(folder, str(first.local_rank))), None)
    if first.exitcode in told and log and (errors := _errors(log)):
        return UserError(errors[-1], ExitCode(first.exitcode))
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log else []
    print("\n".join(lines[-_LOG_TAIL_LINES:]), file=sys.stderr)
    how = f"signal {signal.Signals(-first.exitcode).name}" if first.exitcode < 0 else f"exit code {first.exitcode}"
    last = lines[-1] if lines else "its log is empty"
    return UserError(f"worker of rank {first.local_rank} died ({how}): {last}; log: {log}", ExitCode.WORKER_DIED)


def _logs(folder: Path, rank: str = "*") -> list[Path]:
    """Error logs of the newest start, by rank."""
    starts = sorted((folder / "logs").glob("*/"), key=lambda path: path.stat().st_mtime)
    return sorted(starts[-1].glob(f"attempt_0/{rank}/stderr.log")) if starts else []


def _errors(log: Path) -> list[str]:
    prefix = "hetermoe: error: "
    lines = log.read_text(errors="replace").splitlines()
    return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
