"""What a worker that cannot go on leaves in its log."""

import os
import sys
from typing import NoReturn

import pytest

from hetermoe_cli.errors import ExitCode
from hetermoe_cli.runtime import worker
from hetermoe_cli.runtime.peers import PeerLost, peer_errors


def failing_call(*_: object) -> None:
    with peer_errors():
        raise RuntimeError("closed\nby the other side")


def gone(*_: object) -> None:
    raise PeerLost("lost a peer: rank 1 is gone")


@pytest.mark.parametrize(
    ("train", "traced", "told"),
    [(failing_call, True, "closed by the other side"), (gone, False, "rank 1 is gone")],
)
def test_a_lost_peer_is_told_below_the_call_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], train: object, traced: bool, told: str
) -> None:
    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", ["worker", "run.yaml"])
    monkeypatch.setattr(worker, "_follow_parent", lambda: None)
    monkeypatch.setattr(worker, "load", lambda *_: None)
    monkeypatch.setattr(worker, "train", train)
    with pytest.raises(SystemExit) as left:
        worker.main()
    log = capsys.readouterr().err
    assert left.value.code == ExitCode.WORKER_DIED
    assert log.splitlines()[-1] == f"hetermoe: error: lost a peer: {told}"
    assert ("failing_call" in log) == traced
    assert traced or log.count("\n") == 1
