"""Runs `hetermoe train` as a user does, and reads what it leaves behind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from hetermoe_cli.runtime.recorder import read_metrics

HETERMOE = [str(Path(sys.executable).parent / "hetermoe")]


def train(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`hetermoe train` with `arguments`; it must leave with `code`."""
    command = [*HETERMOE, "train", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl of one kind."""
    return [line for line in read_metrics(folder) if line["event"] == kind]
