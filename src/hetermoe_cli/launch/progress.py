"""The progress line of a run: follows metrics.jsonl, so that it shows what is on disk and nothing else."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hetermoe_cli.runtime.recorder import METRICS
from hetermoe_cli.spec.run import RunSpec

_POLL_SECONDS = 0.25
_LINE_SECONDS = 10.0


class Follower:
    """Context manager: a thread that shows new steps on stderr until the block ends."""

    def __init__(self, run: RunSpec) -> None:
        self._path = Path(run.folder) / METRICS
        self._offset = self._path.stat().st_size if self._path.exists() else 0
        self._run = run
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        console = Console(stderr=True)
        view: _Bar | _Lines = (
            _Bar(console, self._run.steps) if console.is_terminal else _Lines(console, self._run.steps)
        )
        with view:
            while not self._done.wait(_POLL_SECONDS):
                self._show(view)
            self._show(view)

    def _show(self, view: "_Bar | _Lines") -> None:
        for line in self._new_lines():
            if line["event"] == "step":
                view.step(line["step"] + 1, describe(line))
            elif line["event"] == "validation":
                view.note(f"step {line['step'] + 1}: validation loss {line['loss']:.4f} nats a token")

    def _new_lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        size = self._path.stat().st_size
        if size < self._offset:  # a resumed run rewrote the file
            self._offset = 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class _Bar:
    """A progress bar, on a terminal."""

    def __init__(self, console: Console, steps: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("starting workers", total=steps)

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, done: int, text: str) -> None:
        self._progress.update(self._task, completed=done, description=text)

    def note(self, text: str) -> None:
        self._progress.console.print(text)


class _Lines:
    """A line now and then, in a log."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        self._next = 0.0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, done: int, text: str) -> None:
        if time.monotonic() >= self._next or done == self._steps:
            self._next = time.monotonic() + _LINE_SECONDS
            self.note(f"step {done} of {self._steps}: {text}")

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def describe(line: dict[str, Any]) -> str:
    """One step as text."""
    emulated = "emulated " if line["emulated"] else ""
    measured, predicted = line["iteration_seconds"], line["predicted_iteration_seconds"]
    return (
        f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s  "
        f"{emulated}iteration {measured * 1e3:.0f} ms (predicted {predicted * 1e3:.0f})"
    )
