"""What a worker that cannot go on leaves in its log, and what one that skips a step leaves in its metrics."""

import json
import os
import sys
from math import inf, nan
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from builders import make_plan
from hetermoe_cli.errors import ExitCode
from hetermoe_cli.runtime import worker
from hetermoe_cli.runtime.peers import PeerLost, peer_errors
from hetermoe_cli.runtime.recorder import METRICS, Recorder
from hetermoe_cli.runtime.trainer import StepResult
from hetermoe_cli.spec.run import RunSpec


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


def test_metrics_of_a_step_that_overflowed_are_json(tmp_path: Path) -> None:
    """Which has neither NaN nor Infinity: where activations overflow, the gate's losses do as well."""
    run = RunSpec(plan=make_plan(), folder=str(tmp_path), corpus_sha256="0", precision="fp16", steps=2)
    rows = np.ones((run.model.layers, run.model.experts))
    result = StepResult(nan, (nan, inf), inf, 1e-3, rows, False, 0.0, 65536.0, True)
    worker._report(run, Recorder(run, 0), 0, result, 1.0)
    text = (tmp_path / METRICS).read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in {text}"))
    assert [line[name] for name in ("loss", "auxiliary_loss", "z_loss", "gradient_norm")] == [None] * 4
