"""Peak of memory per rank of a finished run: what the plan predicted against what was measured."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from hetermoe_cli.errors import UserError
from hetermoe_cli.report.run_figures import read_run
from hetermoe_cli.runtime.run.recorder import memory_path
from hetermoe_cli.spec.files import read_text
from hetermoe_cli.spec.run import RunSpec

_FIELDS = ("start_bytes", "step_peak_bytes", "peak_bytes")
_LATER_FIELDS = ("start_up_peak_bytes",)  # which older runs do not have


@dataclass(frozen=True)
class RunMemory:
    """Bytes by rank, above what there was before the model was built.

    `predicted_bytes`: the plan's, without the framework's; None of an emulated run, whose memory is not the plan's
    devices'. `measured_bytes`: peak of the training steps. `whole_run_bytes`: peak with building, validation and
    checkpoints; `start_up_bytes`: peak until the first step. None where a rank could not measure.
    """

    predicted_bytes: list[int] | None
    measured_bytes: list[int | None]
    whole_run_bytes: list[int | None]
    start_bytes: list[int | None]
    start_up_bytes: list[int | None]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return dict(vars(self))


def run_memory(folder: Path) -> RunMemory:
    """Read a run folder; UserError on a broken file."""
    run = read_run(folder)
    found = [_read(folder, rank) for rank in range(run.world.size)]
    names = (*_FIELDS, *_LATER_FIELDS)
    start, measured, whole, start_up = ([values.get(name) for values in found] for name in names)
    return RunMemory(_predicted(run), measured, whole, start, start_up)


def _predicted(run: RunSpec) -> list[int] | None:
    if run.emulation:
        return None
    return [memory.total_bytes - memory.framework_bytes for memory in run.plan.memory]


def _read(folder: Path, rank: int) -> dict[str, int]:
    path = memory_path(folder, rank)
    if not path.exists():
        return {}
    try:
        values = json.loads(read_text(path))
        later = [name for name in _LATER_FIELDS if name in values]
        return {name: int(values[name]) for name in (*_FIELDS, *later)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the peaks of memory of this run ({error}): run it again") from error


def memory_table(memory: RunMemory) -> Table:
    """One row a rank."""
    table = Table(
        "rank", "predicted peak", "measured, training steps", "measured, start-up", "measured, whole run",
        "before the model",
        title="memory (MB, above what there was before the model)", title_justify="left",
    )  # fmt: skip
    for rank, measured in enumerate(memory.measured_bytes):
        predicted = memory.predicted_bytes[rank] if memory.predicted_bytes else None
        against = f" ({(measured / predicted - 1) * 100:+.1f} %)" if measured and predicted else ""
        whole, start = memory.whole_run_bytes[rank], memory.start_bytes[rank]
        table.add_row(
            str(rank),
            "of other devices" if predicted is None else _megabytes(predicted),
            _megabytes(measured) + against,
            _megabytes(memory.start_up_bytes[rank]),
            _megabytes(whole),
            _megabytes(start),
        )
    return table


def _megabytes(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 1e6:,.0f}"
