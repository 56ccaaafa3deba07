"""What the logs of workers say about how a run ended."""

import signal
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.ends import PeerFailure
from hetermoe_cli.runtime.run.recorder import CHECKPOINTS

_LOG_TAIL_LINES = 15
_PREFIX, _FRAME = "hetermoe: error: ", "frame #"
_FOLLOWING = (ExitCode.WORKER_DIED, -signal.SIGTERM)  # lost a peer, or were ended by the launcher
_TOLD = (ExitCode.BAD_INPUT, ExitCode.DOES_NOT_FIT)  # in one line
_TERMINATION_SECONDS = 30  # torch kills workers that have not ended so long after it asked them to


def failure(logs: Path, failures: Mapping[int, Any], killed: Collection[int]) -> tuple[UserError, list[str]]:
    """The worker that failed first, and the tail of its log, if that says more. `logs`: those of this node's workers.

    PeerFailure if all that failed here only lost a peer. `failures`: torch's, by rank; `killed`: processes that the
    launcher has killed, as another one had ended.
    """
    seen = min(failed.timestamp for failed in failures.values())
    tails = {rank: _lines(logs, failed.local_rank)[-_LOG_TAIL_LINES:] for rank, failed in failures.items()}
    follows = {rank: _follows(failed, tails[rank], seen, killed) for rank, failed in failures.items()}

    def order(rank: int) -> tuple[bool, bool, int, int]:
        return follows[rank], failures[rank].exitcode not in _TOLD, failures[rank].timestamp, rank

    rank = min(failures, key=order)
    first, tail, log = failures[rank], tails[rank], _log(logs, failures[rank].local_rank)
    if first.exitcode in _TOLD and log and (errors := _errors(log)):
        return UserError(errors[-1], ExitCode(first.exitcode)), []
    how = f"signal {signal.Signals(-first.exitcode).name}" if first.exitcode < 0 else f"exit code {first.exitcode}"
    last = tail[-1] if tail else "its log is empty"
    kind = PeerFailure if follows[rank] else UserError
    return kind(f"worker of rank {rank} died ({how}): {last}; log: {log}", ExitCode.WORKER_DIED), tail


def _follows(failed: Any, tail: list[str], seen: int, killed: Collection[int]) -> bool:
    """Whether this worker ended only because another did; `seen`: when torch saw the first failure of this node."""
    if failed.exitcode == -signal.SIGABRT:  # NCCL's watchdog ends those that lost a peer so, or had an error of CUDA
        text = "\n".join(tail)
        return "ProcessGroupNCCL" in text and "CUDA error" not in text
    if failed.exitcode == -signal.SIGKILL:  # it only waited, and did not hear that it should end
        return failed.pid in killed or bool(failed.timestamp - seen >= _TERMINATION_SECONDS)
    return failed.exitcode in _FOLLOWING


def unsaved(logs: Path) -> UserError | None:
    """The reason, where a worker of this node could not save an interrupted run."""
    for log in _newest(logs):
        for line in _errors(log):
            if not line.startswith(("lost a peer", "the launcher is gone")):
                return UserError(f"interrupted, and not saved: {line}")
    return None


def interrupted_early(folder: Path) -> UserError:
    """Of an interrupted run without a last word: there was nothing to save yet."""
    from hetermoe_cli.model.weights.checkpoint import find_latest

    latest = find_latest(folder / CHECKPOINTS)
    found = f"the newest checkpoint is {latest.name}" if latest else "before anything was saved"
    return UserError(f"interrupted: {found}; logs in {folder / 'logs'}", ExitCode.INTERRUPTED)


def _newest(logs: Path, rank: str = "*") -> list[Path]:
    """Error logs of the newest start, by rank on this node."""
    starts = sorted(logs.glob("*/"), key=lambda path: path.stat().st_mtime)
    return sorted(starts[-1].glob(f"attempt_0/{rank}/stderr.log")) if starts else []


def _log(logs: Path, local_rank: int) -> Path | None:
    return next(iter(_newest(logs, str(local_rank))), None)


def _lines(logs: Path, local_rank: int) -> list[str]:
    """Without the frames of C++ stacks: NCCL's watchdog prints several, of 6 to 10 each, and the cause before them."""
    log = _log(logs, local_rank)
    lines = log.read_text(errors="replace").splitlines() if log else []
    return [line for line in lines if line.strip() and not line.startswith(_FRAME)]


def _errors(log: Path) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [line.removeprefix(_PREFIX) for line in lines if line.startswith(_PREFIX)]
