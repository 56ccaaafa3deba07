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


def failed(codes: dict[int, int], first_rank: int = 2) -> dict[int, SimpleNamespace]:
    return {first_rank + n: SimpleNamespace(local_rank=n, exitcode=code) for n, code in codes.items()}


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
    error, tail = failure(tmp_path, failed(codes))
    assert error.code == code
    assert expected in str(error)
    assert isinstance(error, PeerFailure) == follows
    if codes[0] == 6 and not follows:
        assert tail == ["more of 1", "last of 1"]


def test_why_nothing_was_saved(tmp_path: Path) -> None:
    assert unsaved(tmp_path) is None
    write(tmp_path, {0: "hetermoe: error: lost a peer: closed\n", 1: "hetermoe: error: the disk is full\n"})
    error = unsaved(tmp_path)
    assert error is not None
    assert str(error) == "interrupted, and not saved: the disk is full"
    assert error.code is ExitCode.BAD_INPUT
