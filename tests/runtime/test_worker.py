"""How a worker that cannot go on ends, and what it leaves in its log."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from builders import make_plan
from hetermoe_cli.errors import ExitCode
from hetermoe_cli.runtime import worker
from hetermoe_cli.runtime.peers import PeerLost, peer_errors
from hetermoe_cli.runtime.recorder import Recorder, read_metrics
from hetermoe_cli.runtime.trainer import StepResult
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


def test_metrics_of_a_skipped_step_are_json(tmp_path: Path) -> None:
    """Where activations overflow, the router's losses are not finite either."""
    run = RunSpec(plan=make_plan(), folder=str(tmp_path), corpus_sha256="", precision="fp16", steps=1)
    rows, nan = np.ones((run.model.layers, run.model.experts)), math.nan
    result = StepResult(nan, (nan, math.inf), nan, 1e-3, rows, False, 0.0, 2.0**16, True)
    worker._report(run, Recorder(run, 0), 0, result, 1.0)
    (line,) = read_metrics(tmp_path)
    assert [line[name] for name in ("loss", "auxiliary_loss", "z_loss", "gradient_norm")] == [None] * 4
    json.dumps(line, allow_nan=False)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
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
