"""Runs `hetermoe` inside the test's own process, where torch is loaded, and reads what `train` leaves behind.

test_train_cmd.py starts it as a user does.
"""

import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hetermoe_cli.cli.main import main
from hetermoe_cli.runtime.run.recorder import read_metrics

HETERMOE = [str(Path(sys.executable).parent / "hetermoe")]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`hetermoe` with `arguments`."""
    command, out, err = ["hetermoe", *map(str, arguments)], StringIO(), StringIO()
    streams = redirect_stdout(out), redirect_stderr(err)
    with patch.object(sys, "argv", command), streams[0], streams[1], pytest.raises(SystemExit) as caught:
        main()
    code = caught.value.code
    return subprocess.CompletedProcess(command, code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def train(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`hetermoe train` with `arguments`; it must leave with `code`."""
    done = run("train", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl of one kind."""
    return [line for line in read_metrics(folder) if line["event"] == kind]
