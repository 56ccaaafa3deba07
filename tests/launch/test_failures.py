"""Which worker of a node failed first, and what its log says."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from hetermoe_cli.errors import ExitCode
from hetermoe_cli.launch.ends import PeerFailure
from hetermoe_cli.launch.failures import failure, unsaved


def write(logs: Path, texts: dict[int, str], start: str = "run_b") -> None:
    for local_rank, text in texts.items():
        folder = logs / start / "attempt_0" / str(local_rank)
        folder.mkdir(parents=True)
        (folder / "stderr.log").write_text(text)


def failed(
    codes: dict[int, int], first_rank: int = 2, times: dict[int, int] | None = None
) -> dict[int, SimpleNamespace]:
    """As torch tells them; `times`: when it saw those that it did not see at once."""
    seen = {n: 1000 + (times or {}).get(n, 0) for n in codes}
    return {
        first_rank + n: SimpleNamespace(local_rank=n, exitcode=code, timestamp=seen[n], pid=100 + n)
        for n, code in codes.items()
    }


@pytest.mark.parametrize(
    ("codes", "code", "expected", "follows"),
    [
        ({0: 6, 1: -signal.SIGKILL}, 6, "worker of rank 3 died (signal SIGKILL): last of 1", False),
        ({0: 6, 1: 1}, 6, "worker of rank 3 died (exit code 1): last of 1", False),
        ({0: 3, 1: 1}, 3, "no such text", False),
        ({0: 6, 1: -signal.SIGTERM}, 6, "worker of rank 2 died (exit code 6)", True),
    ],
)
def test_the_first_failure(tmp_path: Path, codes: dict[int, int], code: int, expected: str, follows: bool) -> None:
    write(tmp_path, {0: "old"}, start="run_a")
    os.utime(tmp_path / "run_a", (0, 0))
    write(tmp_path, {0: "hetermoe: error: no such text\n", 1: "more of 1\n\nlast of 1\n"})
    error, tail = failure(tmp_path, failed(codes), ())
    assert error.code == code
    assert expected in str(error)
    assert isinstance(error, PeerFailure) == follows
    if codes[0] == 6 and not follows:
        assert tail == ["more of 1", "last of 1"]


def stack(place: str, frames: int) -> str:
    calls = "".join(f"frame #{n}: c10d::ProcessGroupNCCL::Watchdog::run() + 0x{n:x}\n" for n in range(frames))
    return f"Exception raised from {place} (most recent call first):\n{calls}\n"


def watchdog(cause: str) -> str:
    """As torch's ends a process: the cause and where, the same again, and where it was thrown on."""
    told = "Process group watchdog thread terminated with exception:"
    first = f"{cause}\n\n{stack('c10_cuda_check_implementation at /pytorch/c10/cuda/CUDAException.cpp:43', 10)}"
    return (
        f"[rank1]:[E409 ProcessGroupNCCL.cpp:2057] [PG ID 0 PG GUID 0(default_pg) Rank 1] {told} {first}"
        f"terminate called after throwing an instance of 'c10::DistBackendError'\n"
        f"  what():  [PG ID 0 PG GUID 0(default_pg) Rank 1] {told} {first}"
        f"{stack('run at /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:2063', 6)}"
    )


LOST = watchdog("NCCL error: remote process exited or there was a network error")
FAULT = watchdog(
    "CUDA error: an illegal memory access was encountered\n"
    "CUDA kernel errors might be asynchronously reported at some other API call\n"
    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
)
KILL, ABORT = -signal.SIGKILL, -signal.SIGABRT


@pytest.mark.parametrize(
    ("codes", "times", "texts", "rank", "follows"),
    [
        ({0: KILL, 1: 1}, {0: 30}, {}, 3, False),  # torch killed the one that only waited
        ({0: 1, 1: 1}, {0: 2}, {}, 3, False),
        ({0: KILL, 1: KILL}, {0: 31}, {}, 3, False),
        ({0: 6, 1: KILL}, {1: 30}, {}, 2, True),  # what they followed was on another node
        ({0: ABORT, 1: -signal.SIGSEGV}, {1: 2}, {0: LOST}, 3, False),
        ({0: ABORT, 1: 6}, {1: 2}, {0: LOST}, 2, True),
        ({0: ABORT, 1: 6}, {}, {0: FAULT}, 2, False),
        ({0: 1, 1: ABORT}, {0: 2}, {1: "free(): invalid pointer"}, 3, False),
    ],
)
def test_survivors_that_nccl_or_torch_ended_are_not_blamed(
    tmp_path: Path, codes: dict[int, int], times: dict[int, int], texts: dict[int, str], rank: int, follows: bool
) -> None:
    write(tmp_path, texts)
    error, _ = failure(tmp_path, failed(codes, times=times), ())
    assert str(error).startswith(f"worker of rank {rank} died")
    assert isinstance(error, PeerFailure) == follows


@pytest.mark.parametrize(("codes", "rank", "follows"), [({0: KILL, 1: 6}, 2, True), ({0: KILL, 1: 1}, 3, False)])
def test_a_worker_that_the_launcher_killed_is_not_blamed(
    tmp_path: Path, codes: dict[int, int], rank: int, follows: bool
) -> None:
    error, _ = failure(tmp_path, failed(codes), {100})
    assert str(error).startswith(f"worker of rank {rank} died")
    assert isinstance(error, PeerFailure) == follows


def test_why_nothing_was_saved(tmp_path: Path) -> None:
    assert unsaved(tmp_path) is None
    write(tmp_path, {0: "hetermoe: error: lost a peer: closed\n", 1: "hetermoe: error: the disk is full\n"})
    error = unsaved(tmp_path)
    assert error is not None
    assert str(error) == "interrupted, and not saved: the disk is full"
    assert error.code is ExitCode.BAD_INPUT
