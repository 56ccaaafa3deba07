"""Figures of a finished run: metrics, expert loads, and the prediction that replays the recorded loads."""

import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hetermoe_cli.cost.load import RecordedLoad
from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.runtime.run.recorder import METRICS, STATUS, load_path, read_metrics, read_rebalances
from hetermoe_cli.spec.files import load, read_text
from hetermoe_cli.spec.rebalance import Rebalance
from hetermoe_cli.spec.run import RunSpec

WARM_UP_STEPS = 2
REPLAYED_STEPS = 20


@dataclass(frozen=True)
class Moved:
    """Experts moved before `step`; medians of measured iterations before and after it, null where there are none."""

    step: int
    experts: int
    before_seconds: float | None
    after_seconds: float | None


@dataclass(frozen=True)
class RunFigures:
    """Seconds are the run's own (an emulated run's are nominal x time_scale); medians over the steps
    since the last start or move of experts, after the warm-up. Tokens/s of an emulated run are nominal.

    `predicted_seconds` is the plan's, or after a move that for the load which caused it; `replayed_seconds` replays
    the expert rows that were recorded. Losses are those of the first and last step that did not overflow, null where
    all did.
    """

    steps: int
    first_loss: float | None
    last_loss: float | None
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
    moves: list[Moved] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def read_run(folder: Path) -> RunSpec:
    """run.yaml of a run folder."""
    return load(RunSpec, folder / "run.yaml")


def recorded_load(run: RunSpec, step: int, copy: int = 0) -> RecordedLoad | None:
    """The expert rows that one copy of the model sent in a step; None if they were not kept. UserError on a broken
    file."""
    replica = run.plan.world.replicas[copy]
    layout = replica.layout
    counts = np.zeros((layout.world_size, layout.layers, layout.micro_batches, layout.experts), np.int64)
    for rank in layout.attending:
        path = load_path(Path(run.folder), replica.processes[rank])
        if not path.exists():
            return None
        try:
            counts[rank] = np.load(path, mmap_mode="r", allow_pickle=False)[step]
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise UserError(f"{path}: not the expert rows of this run's step {step} ({error})") from error
    return RecordedLoad(counts, run.row_scale)


def replayed_seconds(run: RunSpec, steps: list[int]) -> float | None:
    """Median over steps, with experts where they are in the last, of the simulated iteration with the rows recorded in
    each; nominal seconds."""
    replayed, found = replay_groups(run.plan.inputs, _in_the_end(run).groups), []
    for step in steps:
        loads = [recorded_load(run, step, copy) for copy in range(len(replayed.copies))]
        if all(loads):
            found.append(replayed.seconds_under(loads))
    return median(found) if found else None


def timed_steps(run: RunSpec, metrics: list[dict[str, Any]], warm_up: int = WARM_UP_STEPS) -> list[dict[str, Any]]:
    """Step lines since the last start or move of experts, after the warm-up (all of them if there are no more)."""
    steps = [line for line in metrics if line["event"] == "step"]
    first = max([run.start_step, *(change.step for change in _moves_since_start(run))])
    recent = [line for line in steps if line["step"] >= first] or steps  # an earlier part had another layout
    return recent[warm_up:] or recent


def _moves_since_start(run: RunSpec) -> list[Rebalance]:
    return [change for change in read_rebalances(Path(run.folder)) if change.step > run.start_step]


def _in_the_end(run: RunSpec) -> RunSpec:
    """The run with the experts where they are in its last steps."""
    return run.model_copy(update={"rebalanced": changes[-1]}) if (changes := _moves_since_start(run)) else run


def _moved(run: RunSpec, steps: list[dict[str, Any]], warm_up: int) -> list[Moved]:
    """Every move since the last start, with up to REPLAYED_STEPS iterations on each side, the first one left out."""
    changes = _moves_since_start(run)
    borders = [run.start_step + warm_up - 1, *(change.step for change in changes), run.steps]
    seconds = {line["step"]: line["iteration_seconds"] for line in steps}
    parts = [
        [seconds[step] for step in range(first + 1, last) if step in seconds]
        for first, last in itertools.pairwise(borders)
    ]
    return [
        Moved(
            step=change.step,
            experts=change.moved,
            before_seconds=median(before[-REPLAYED_STEPS:]) if before else None,
            after_seconds=median(after[:REPLAYED_STEPS]) if after else None,
        )
        for change, before, after in zip(changes, parts, parts[1:], strict=False)
    ]


def figures(folder: Path, warm_up: int = WARM_UP_STEPS) -> RunFigures:
    """Read a run folder; UserError if it holds no finished step."""
    run = read_run(folder)
    metrics = read_metrics(folder)
    steps = [line for line in metrics if line["event"] == "step"]
    if not steps:
        raise UserError(f"{folder / METRICS}: no finished step")
    timed = timed_steps(run, metrics, warm_up)
    replayed = replayed_seconds(run, [line["step"] for line in timed][-REPLAYED_STEPS:])
    losses = [line["loss"] for line in steps if line["loss"] is not None] or [None]  # all of them overflowed
    validation = [line["loss"] for line in metrics if line["event"] == "validation"]
    status = json.loads(read_text(folder / STATUS)) if (folder / STATUS).exists() else {}
    measured = median(line["iteration_seconds"] for line in timed)
    return RunFigures(
        steps=len(steps),
        first_loss=losses[0],
        last_loss=losses[-1],
        validation_loss=validation[-1] if validation else None,
        measured_seconds=measured,
        predicted_seconds=_in_the_end(run).predicted_seconds,
        replayed_seconds=None if replayed is None else replayed * run.time_scale,
        tokens_per_second=run.tokens_per_second(measured),
        expert_imbalance=median(line["expert_imbalance"] for line in timed),
        emulated=run.emulation is not None,
        emulation_valid=status.get("emulation_valid"),
        overruns=status.get("overruns"),
        time_scale=run.time_scale,
        router=run.router,
        moves=_moved(run, steps, warm_up),
    )
