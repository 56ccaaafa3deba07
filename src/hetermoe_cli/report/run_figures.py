"""Figures of a finished run: metrics, expert loads, and the prediction that replays the recorded loads."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hetermoe_cli.cost import CostModel, LayoutCost
from hetermoe_cli.cost.layout import RecordedLoad
from hetermoe_cli.errors import UserError
from hetermoe_cli.runtime.recorder import METRICS, STATUS, load_path, read_metrics
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.files import load, read_text
from hetermoe_cli.spec.run import RunSpec

WARM_UP_STEPS = 2
REPLAYED_STEPS = 20


@dataclass(frozen=True)
class RunFigures:
    """Seconds are the run's own (an emulated run's are nominal x time_scale); medians over the steps
    since the last start, after the warm-up. Tokens/s of an emulated run are nominal.

    `predicted_seconds` assumes a balanced router; `replayed_seconds` replays the expert rows that were recorded.
    """

    steps: int
    first_loss: float
    last_loss: float
    validation_loss: float | None
    measured_seconds: float
    predicted_seconds: float
    replayed_seconds: float | None
    tokens_per_second: float
    expert_imbalance: float
    emulated: bool
    emulation_valid: bool | None
    overruns: int | None
    time_scale: float
    router: str

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return dict(vars(self))


def read_run(folder: Path) -> RunSpec:
    """run.yaml of a run folder."""
    return load(RunSpec, folder / "run.yaml")


def recorded_load(run: RunSpec, step: int) -> RecordedLoad | None:
    """The expert rows that were sent in one step of a run; None if they were not kept. UserError on a broken file."""
    layout = run.plan.layout
    counts = np.zeros((layout.world_size, layout.layers, layout.micro_batches, layout.experts), np.int64)
    for rank in layout.attending:
        path = load_path(Path(run.folder), rank)
        if not path.exists():
            return None
        try:
            counts[rank] = np.load(path, mmap_mode="r", allow_pickle=False)[step]
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"{path}: not the expert rows of this run's step {step} ({error})") from error
    return RecordedLoad(counts, run.row_scale)


def replayed_seconds(run: RunSpec, steps: list[int]) -> float | None:
    """Median over steps of the simulated iteration with the rows recorded in each; nominal seconds."""
    cost = CostModel(run.plan.inputs)
    loads = [recorded_load(run, step) for step in steps]
    found = [simulate(LayoutCost(cost, run.plan.layout, load)).seconds for load in loads if load]
    return median(found) if found else None


def timed_steps(run: RunSpec, metrics: list[dict[str, Any]], warm_up: int = WARM_UP_STEPS) -> list[dict[str, Any]]:
    """Step lines since the last start, after the warm-up (all of them if there are no more)."""
    steps = [line for line in metrics if line["event"] == "step"]
    recent = [line for line in steps if line["step"] >= run.start_step] or steps  # an earlier part had another plan
    return recent[warm_up:] or recent


def figures(folder: Path, warm_up: int = WARM_UP_STEPS) -> RunFigures:
    """Read a run folder; UserError if it holds no finished step."""
    run = read_run(folder)
    metrics = read_metrics(folder)
    steps = [line for line in metrics if line["event"] == "step"]
    if not steps:
        raise UserError(f"{folder / METRICS}: no finished step")
    timed = timed_steps(run, metrics, warm_up)
    replayed = replayed_seconds(run, [line["step"] for line in timed][-REPLAYED_STEPS:])
    losses = [line["loss"] for line in steps if line["loss"] is not None] or [math.nan]  # none: all of them overflowed
    validation = [line["loss"] for line in metrics if line["event"] == "validation"]
    status = json.loads(read_text(folder / STATUS)) if (folder / STATUS).exists() else {}
    measured = median(line["iteration_seconds"] for line in timed)
    return RunFigures(
        steps=len(steps),
        first_loss=losses[0],
        last_loss=losses[-1],
        validation_loss=validation[-1] if validation else None,
        measured_seconds=measured,
        predicted_seconds=run.plan.predicted.iteration_seconds * run.time_scale,
        replayed_seconds=None if replayed is None else replayed * run.time_scale,
        tokens_per_second=run.tokens_per_second(measured),
        expert_imbalance=median(line["expert_imbalance"] for line in timed),
        emulated=run.emulation is not None,
        emulation_valid=status.get("emulation_valid"),
        overruns=status.get("overruns"),
        time_scale=run.time_scale,
        router=run.router,
    )
