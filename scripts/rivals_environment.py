"""The environment of the rivals: pinned, in a folder of its own, so that nothing of it meets the engine's."""

import subprocess
import sys
from pathlib import Path

from demo import ROOT
from hetermoe_cli.errors import UserError

FOLDER = ROOT / "build" / "rivals-venv"
PINNED = (
    "torch==2.13.0",
    "transformers==5.2.0",
    "deepspeed==0.19.8",
    "safetensors==0.8.0",
    "numpy==2.4.6",
)
_PINNED_FILE = "pinned.txt"


def environment(folder: Path = FOLDER, pinned: tuple[str, ...] = PINNED) -> Path:
    """Its Python; made with venv and pip unless it is there with the same pins. UserError if that fails."""
    python, stamp = folder / "bin" / "python", folder / _PINNED_FILE
    wanted = "\n".join(pinned) + "\n"
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"installing {', '.join(pinned)} into {folder}", file=sys.stderr)
    stamp.unlink(missing_ok=True)
    _run("make the rivals' environment", sys.executable, "-m", "venv", "--clear", folder)
    _run("install the rivals (is there a network?)", python, "-m", "pip", "install", "--quiet", *pinned)
    stamp.write_text(wanted)
    return python


def _run(purpose: str, *command: object) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        wrong = [line for line in errors if line.startswith("ERROR")] or errors or [f"exit code {done.returncode}"]
        raise UserError(f"cannot {purpose}: {wrong[-1]}; tried: {' '.join(words)}")
