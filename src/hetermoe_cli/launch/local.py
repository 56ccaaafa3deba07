"""Start the workers of a run on this machine through torch's elastic launcher, and tell how they ended."""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.runtime.recorder import STATUS
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.run import RunSpec

WORKER = "hetermoe_cli.runtime.worker"
RUN_FILE = "run.yaml"
_SHUTDOWN_SECONDS = 600  # after Ctrl-C: the step in progress, and the checkpoint
_LOG_TAIL_LINES = 15


def command(run: RunSpec) -> list[str]:
    """What every worker executes."""
    return [sys.executable, "-m", WORKER, str(Path(run.folder) / RUN_FILE)]


def environment(run: RunSpec) -> dict[str, str]:
    """Variables that the workers get beside the launcher's own (RANK, WORLD_SIZE, MASTER_ADDR, ...)."""
    return {
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
        nproc_per_node=run.plan.layout.world_size,
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
        raise UserError(f"interrupted before anything was saved; logs in {folder / 'logs'}", ExitCode.INTERRUPTED)
    status: dict[str, Any] = json.loads(path.read_text())
    if status["state"] == "interrupted":
        raise UserError(
            f"interrupted: saved at step {status['saved_step']}, go on with --resume --run-folder {folder}",
            ExitCode.INTERRUPTED,
        )
    return status


def _failure(folder: Path, failures: dict[int, Any]) -> UserError:
    """The worker that failed first, with the tail of its log."""
    followers = (ExitCode.WORKER_DIED, -signal.SIGTERM)  # lost a peer, or were ended by the launcher
    first = min(failures.values(), key=lambda f: (f.exitcode in followers, f.timestamp, f.local_rank))
    log = _newest(folder.glob(f"logs/*/attempt_0/{first.local_rank}/stderr.log"))
    lines = log.read_text(errors="replace").splitlines() if log else []
    ours = [line for line in lines if line.startswith("hetermoe: error: ")]
    if first.exitcode in (ExitCode.BAD_INPUT, ExitCode.DOES_NOT_FIT) and ours:
        return UserError(ours[-1].removeprefix("hetermoe: error: "), ExitCode(first.exitcode))
    print("\n".join(lines[-_LOG_TAIL_LINES:]), file=sys.stderr)
    how = f"signal {signal.Signals(-first.exitcode).name}" if first.exitcode < 0 else f"exit code {first.exitcode}"
    last = lines[-1] if lines else "its log is empty"
    return UserError(f"worker of rank {first.local_rank} died ({how}): {last}; log: {log}", ExitCode.WORKER_DIED)


def _newest(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)
