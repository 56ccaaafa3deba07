"""The progress line of a run: follows metrics.jsonl, so that it shows what is on disk and nothing else."""

import os
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hetermoe_cli.runtime.run.recorder import METRICS, event_of
from hetermoe_cli.spec.run import RunSpec

_POLL_SECONDS = 0.25
_LINE_SECONDS = 10.0
_TAIL_BYTES = 65536


class Follower:
    """Context manager: a thread that shows new steps on stderr until the block ends."""

    def __init__(self, run: RunSpec) -> None:
        self._path = Path(run.folder) / METRICS
        self._run = run
        self._began = time.time()
        self._shown: set[tuple[str, int]] = set()
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
            elif line["event"] in ("drift", "rebalance"):
                view.note(f"step {line['step'] + 1}: {line['message']}")
            elif line["event"] == "validation":
                loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f} nats a token"
                view.note(f"step {line['step'] + 1}: validation loss {loss}")

    def _new_lines(self) -> list[dict[str, Any]]:
        """Events that have not been shown yet; not those of an earlier start, which the workers drop a little later."""
        lines = [line for line in self._last_lines() if line.get("time", 0) >= self._began]
        fresh = [line for line in lines if (line["event"], line["step"]) not in self._shown]
        self._shown |= {(line["event"], line["step"]) for line in fresh}
        return fresh

    def _last_lines(self) -> list[dict[str, Any]]:
        """Whole lines near the end of the file: more than are written between two looks."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
            file.seek(start)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1].splitlines()
        events = map(event_of, whole[1:] if start else whole)
        return [event for event in events if event]  # of a broken line the worker tells


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
    emulated, nominal = ("emulated ", "nominal ") if line["emulated"] else ("", "")
    measured, predicted = line["iteration_seconds"], line["predicted_iteration_seconds"]
    loss = "overflow, skipped" if line.get("skipped") else f"loss {line['loss']:.3f}"
    return (
        f"{loss}  {line['tokens_per_second']:,.0f} {nominal}tokens/s  "
        f"{emulated}iteration {measured * 1e3:.0f} ms (predicted {predicted * 1e3:.0f})"
    )
