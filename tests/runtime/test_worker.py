"""What a worker that cannot go on leaves in its log, and what others leave in metrics and status."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest

from builders import make_plan
from hetermoe_cli.errors import ExitCode
from hetermoe_cli.runtime import worker
from hetermoe_cli.runtime.machine.peers import PeerLost, peer_errors
from hetermoe_cli.runtime.run.recorder import METRICS, STATUS, Recorder
from hetermoe_cli.runtime.step.trainer import StepResult
from hetermoe_cli.spec.files import dump
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
    monkeypatch.setattr(worker, "follow_parent", lambda: None)
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


@pytest.mark.parametrize(("asked", "state", "steps"), [(1, "interrupted", 2), (2, "finished", 3)])
def test_a_run_that_is_interrupted_in_its_last_step_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int, state: str, steps: int
) -> None:
    """`asked`: the step in which a stop is asked for, of three. Resuming would refuse to go on after the last one."""
    run = RunSpec(plan=make_plan(), folder=str(tmp_path), corpus_sha256="0", precision="fp32", steps=3)
    rows = np.ones((run.model.layers, run.model.experts))

    def take(batches: object, step: int, record: bool) -> StepResult:
        return StepResult(1.0, (0.0, 0.0), 1.0, 1e-3, rows, step == asked, 0.0, None, False)

    clock, engine = SimpleNamespace(spans=[], starts={}), SimpleNamespace(counts=None)
    trainer: Any = SimpleNamespace(step=take, engine=engine, clock=clock, validate=lambda *_: 2.0)
    balancer = SimpleNamespace(run=run, after=lambda *_: None)
    monkeypatch.setattr(worker, "_balancer", lambda *_: balancer)
    monkeypatch.setattr(worker, "save", lambda *_: tmp_path / "checkpoint")
    monkeypatch.setattr(worker, "_summary", lambda *_: {})
    recorder = Recorder(run, 0)
    monkeypatch.setattr(recorder, "load", lambda *_: None)
    monkeypatch.setattr(recorder, "trace", lambda *_: None)
    meter: Any = SimpleNamespace(step=nullcontext)
    worker._loop(run, trainer, recorder, (None, None), meter)
    status = json.loads((tmp_path / STATUS).read_text())
    assert (status["state"], status["saved_step"]) == (state, steps)
    assert status.get("validation_loss") == (2.0 if state == "finished" else None)


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def test_an_interrupt_ends_a_worker_that_waits_for_others_to_join(tmp_path: Path) -> None:
    """The others may have ended by the same Ctrl-C, before they came so far."""
    plan = make_plan()
    run = RunSpec(plan=plan, folder=str(tmp_path), corpus_sha256="", precision="fp32", steps=1)
    dump(run, tmp_path / "run.yaml")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "hetermoe_cli.runtime.worker", str(tmp_path / "run.yaml")]
    with subprocess.Popen(command, env=os.environ | place, stderr=subprocess.DEVNULL) as process:
        try:
            while not listens(port) and process.poll() is None:
                time.sleep(0.1)
            time.sleep(0.5)  # it waits for rank 1 by now
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == -signal.SIGINT
        finally:
            process.kill()


def test_an_interrupt_while_torch_is_imported_is_not_lost(tmp_path: Path) -> None:
    """Some of what it imports drops KeyboardInterrupt."""
    lines = ["import os, signal, sys", "try:", "    os.kill(os.getpid(), signal.SIGINT)", "except KeyboardInterrupt:"]
    (tmp_path / "torch.py").write_text("\n".join([*lines, "    sys.exit(0)"]))
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "hetermoe_cli.runtime.worker", "run.yaml"]
    assert subprocess.run(command, env=os.environ | path, timeout=60, check=False).returncode == -signal.SIGINT
