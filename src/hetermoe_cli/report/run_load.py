"""The expert load to plan for: a file, or what a run's learned router sent."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.errors import UserError
from hetermoe_cli.report.run_figures import read_run
from hetermoe_cli.runtime.run.recorder import load_path
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.load import ExpertLoad

SAMPLES = 8  # every one is another replay of whatever the planner looks at


def read_load(path: Path) -> ExpertLoad:
    """A `kind: expert_load` file, or the mean over the recorded steps of a `hetermoe train` run folder, with samples.

    UserError if it is neither, or if the run recorded no step.
    """
    return _of_run(path) if path.is_dir() else load(ExpertLoad, path)


def _of_run(folder: Path) -> ExpertLoad:
    if not (folder / "run.yaml").is_file():
        raise UserError(f"{folder}: no run.yaml in this folder: name a run folder of `hetermoe train`, or a load file")
    world = read_run(folder).world
    rows: NDArray[np.int64] | None = None  # [steps, layers, experts]
    for rank in world.attending:
        path = load_path(folder, rank)
        try:
            counts = np.load(path, mmap_mode="r", allow_pickle=False)  # [steps, layers, micro-batches, experts]
            own = counts.sum(axis=2, dtype=np.int64)
            rows = own if rows is None else rows + own
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: not the expert rows of this run ({error})") from error
    assert rows is not None  # somebody attends
    rows = rows[rows.any(axis=(1, 2))]  # steps that were run
    if not len(rows):
        raise UserError(f"{folder}: it recorded no step: let the run finish one")
    source = f"{folder}: rows of {len(rows)} steps"
    return ExpertLoad(source=source, layers=rows.sum(axis=0).tolist(), samples=_samples(rows).tolist())


def _samples(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Up to SAMPLES of the steps, in the middle of as many equal parts of the run."""
    count = min(SAMPLES, len(rows))
    return rows[[(2 * part + 1) * len(rows) // (2 * count) for part in range(count)]]
