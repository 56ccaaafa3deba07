"""What a run leaves behind: metrics.jsonl, expert loads, traces, peaks of memory, status.json."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.files import dump, load, read_text, write_atomic
from hetermoe_cli.spec.rebalance import Rebalance, Rebalances
from hetermoe_cli.spec.run import RunSpec
from hetermoe_cli.trace import Trace

METRICS, STATUS, CHECKPOINTS, REBALANCES = "metrics.jsonl", "status.json", "checkpoints", "rebalances.yaml"


def trace_path(folder: Path, rank: int) -> Path:
    """Where a rank's trace lies."""
    return folder / "traces" / f"rank{rank}.json"


def load_path(folder: Path, rank: int) -> Path:
    """Where an attending rank's expert counts lie: int32 [steps, layers, micro-batches, experts]."""
    return folder / "loads" / f"rank{rank}.npy"


def memory_path(folder: Path, rank: int) -> Path:
    """Where a rank's peaks of memory lie: MemoryMeter.values()."""
    return folder / "memory" / f"rank{rank}.json"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a last line cut off by a crash is left out. UserError if the file cannot be read."""
    path = folder / METRICS
    text = read_text(path)
    lines = text[: text.rfind("\n") + 1].splitlines()
    events = [event_of(line) for line in lines]
    if None in events:
        raise UserError(f"{path}: line {events.index(None) + 1}: no event of a run: remove the line")
    return [event for event in events if event]


def event_of(line: str | bytes) -> dict[str, Any] | None:
    """What a line of metrics.jsonl tells; None if it is no such line."""
    with suppress(ValueError):
        data = json.loads(line)
        if isinstance(data, dict) and {"event", "step"} <= data.keys():
            return data
    return None


def read_rebalances(folder: Path) -> list[Rebalance]:
    """Changes of placement in a run, in the order of their steps."""
    path = folder / REBALANCES
    return load(Rebalances, path).changes if path.exists() else []


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): free space, resume") from error


def _allocated(path: Path, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """A file of zeros, mapped. It gets its space now: a page without any ends the process later, with SIGBUS."""
    with _disk_errors(path):
        try:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=shape)
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError:
            path.unlink(missing_ok=True)  # it may have taken all that was left
            raise
    return array


def _earlier_loads(path: Path) -> NDArray[np.int32]:
    """What an earlier start recorded; nothing where a crash left no array: that must not keep a run from going on."""
    with suppress(OSError, ValueError, EOFError):
        return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
    return np.zeros(0, np.int32)


class Recorder:
    """Rank 0 writes metrics and status; every rank its trace and peaks of memory; attending ranks their loads."""

    def __init__(self, run: RunSpec, rank: int) -> None:
        self._run, self._rank = run, rank
        self._folder = Path(run.folder)
        self._metrics = self._folder / METRICS
        self._loads = self._open_loads()
        self.labels = {"emulated": run.emulation is not None, "time_scale": run.time_scale, "router": run.router}
        if rank == 0:
            self._keep_until(run.start_step)

    def _open_loads(self) -> NDArray[np.int32] | None:
        world = self._run.plan.world
        if self._rank not in world.attending:
            return None
        layout = world.replica_of(self._rank).layout
        path = load_path(self._folder, self._rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (self._run.steps, layout.layers, layout.micro_batches, layout.experts)
        old = _earlier_loads(path)
        fresh = _allocated(path.with_suffix(".new"), shape)
        if old.shape[1:] == shape[1:]:  # earlier steps of the same layout
            kept = min(len(old), self._run.start_step)
            fresh[:kept] = old[:kept]
        path.with_suffix(".new").replace(path)
        return fresh

    def _keep_until(self, step: int) -> None:
        """Drop metrics of steps that a resumed run does again."""
        if self._metrics.exists():
            kept = [line for line in read_metrics(self._folder) if line["step"] < step]
            write_atomic(self._metrics, "".join(json.dumps(line) + "\n" for line in kept))
        known = read_rebalances(self._folder)
        changes = [change for change in known if change.step <= step]
        if self._run.rebalanced and self._run.rebalanced not in changes:
            changes.append(self._run.rebalanced)
        if changes != known:
            self._write_rebalances(changes)

    def rebalanced(self, change: Rebalance, seconds: float) -> None:
        """Experts have moved, which took the run so long in all (rank 0)."""
        if self._rank == 0:
            self._write_rebalances([*read_rebalances(self._folder), change])
            self.event("moved", change.step - 1, seconds=seconds)

    def _write_rebalances(self, changes: list[Rebalance]) -> None:
        dump(Rebalances(changes=changes), self._folder / REBALANCES, "Where experts moved to in this run.")

    def load(self, step: int, counts: NDArray[np.int32]) -> None:
        """Rows per (layer, micro-batch, expert) that this rank sent in `step`."""
        if self._loads is not None:
            self._loads[step] = counts

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl (rank 0)."""
        if self._rank == 0:
            line = {"event": kind, "step": step, "time": time.time(), **values, **self.labels}
            with _disk_errors(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def trace(self, trace: Trace) -> None:
        """Write this rank's trace."""
        trace.write(trace_path(self._folder, self._rank))

    def memory(self, values: dict[str, int]) -> None:
        """Write this rank's peaks of memory; nothing where none were measured."""
        if values:
            path = memory_path(self._folder, self._rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(values) + "\n")

    def status(self, state: str, step: int, **values: Any) -> None:
        """The last word of a run (rank 0): finished or interrupted."""
        if self._rank == 0:
            write_atomic(self._folder / STATUS, json.dumps({"state": state, "step": step, **values, **self.labels}))
