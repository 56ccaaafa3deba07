"""The agent of a node's workers, once they are to end."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed.elastic.multiprocessing import SignalException

from hetermoe_cli.errors import ExitCode
from hetermoe_cli.launch import agent
from hetermoe_cli.launch.agent import Agent
from hetermoe_cli.launch.ends import PeerFailure
from hetermoe_cli.launch.failures import failure
from hetermoe_cli.launch.meeting import Meeting
from hetermoe_cli.launch.place import Place
from hetermoe_cli.runtime.machine.peers import DISK_TIMEOUT

# Rank 0 leaves as after the loss of a peer; rank 1 hangs, as gloo has not told it, and has a step to finish on SIGTERM.
HANGS = """
import os, pathlib, signal, sys, time
deaf = pathlib.Path(sys.argv[1])
if os.environ["RANK"] == "1":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deaf.touch()
    time.sleep(60)
while not deaf.exists():
    time.sleep(0.01)
sys.exit(6)
"""


class Closing:
    """torch's context of one worker, which is busy for longer than this test waits."""

    def __init__(self) -> None:
        self.worker, self.allowed = subprocess.Popen(["sleep", "60"]), 0

    def close(self, death_sig: signal.Signals, timeout: int) -> None:
        self.allowed = timeout
        self.worker.wait(30)


def make(logs: Path, watch: Any) -> tuple[Agent, Closing]:
    meeting = SimpleNamespace(place=None, store=None, watch=watch)
    result, closing = Agent(["python"], 1, cast(Any, meeting), logs), Closing()
    cast(Any, result)._pcontext = closing
    result.get_worker_group().workers[0].id = closing.worker.pid
    return result, closing


def test_after_ctrl_c_another_nodes_end_ends_a_worker_that_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_POLL_SECONDS", 0.05)

    def watch() -> None:
        raise PeerFailure("node 1: no such text", ExitCode.WORKER_DIED)

    made, closing = make(tmp_path, watch)
    began = time.monotonic()
    made._shutdown(signal.SIGINT, 10)
    assert closing.worker.returncode == -signal.SIGKILL
    assert time.monotonic() - began < 20


def test_after_ctrl_c_a_checkpoint_has_as_long_as_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, closing = make(tmp_path, lambda: None)

    def interrupt(role: str) -> None:
        raise SignalException("Ctrl-C", signal.SIGINT)

    monkeypatch.setattr(made, "_invoke_run", interrupt)
    closing.worker.kill()
    with pytest.raises(SignalException):
        made.run()
    assert closing.allowed > DISK_TIMEOUT.total_seconds()


@pytest.fixture
def handlers() -> Iterator[None]:
    """Those of before: torch's agent leaves its own."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    kept = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_while_torch_waits_for_a_worker_that_hangs_another_nodes_end_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf, main = tmp_path / "deaf", threading.current_thread()

    def watch() -> None:
        if deaf.exists() and threading.current_thread() is not main:  # which torch has
            raise PeerFailure("node 1: worker of rank 2 died", ExitCode.WORKER_DIED)

    with Meeting(Place()) as meeting:
        monkeypatch.setattr(meeting, "watch", watch)
        made, began = Agent([sys.executable, "-c", HANGS, str(deaf)], 2, meeting, tmp_path / "logs"), time.monotonic()
        failures = made.run().failures
    assert time.monotonic() - began < 25  # torch would wait 30
    assert {rank: failed.exitcode for rank, failed in failures.items()} == {0: 6, 1: -signal.SIGKILL}
    error, _ = failure(tmp_path / "logs", failures, made.killed)
    assert isinstance(error, PeerFailure)
