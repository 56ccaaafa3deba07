"""The expert load to plan for: a file, or what a run's learned router sent."""

from pathlib import Path

import numpy as np

from hetermoe_cli.errors import UserError
from hetermoe_cli.report.run_figures import read_run
from hetermoe_cli.runtime.recorder import load_path
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.load import ExpertLoad


def read_load(path: Path) -> ExpertLoad:
    """A `kind: expert_load` file, or the mean over the recorded steps of a `hetermoe train` run folder.

    UserError if it is neither, or if the run recorded no step.
    """
    return _of_run(path) if path.is_dir() else load(ExpertLoad, path)


def _of_run(folder: Path) -> ExpertLoad:
    if not (folder / "run.yaml").is_file():
        raise UserError(f"{folder}: no run.yaml in this folder: name a run folder of `hetermoe train`, or a load file")
    world = read_run(folder).world
    rows = np.zeros((world.layers, world.experts), dtype=np.int64)
    recorded = np.zeros(0, dtype=np.bool_)
    for rank in world.attending:
        path = load_path(folder, rank)
        try:
            counts = np.load(path, mmap_mode="r", allow_pickle=False)  # [steps, layers, micro-batches, experts]
            rows += counts.sum(axis=(0, 2), dtype=np.int64)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not the expert rows of this run ({error})") from error
        recorded = counts.any(axis=(1, 2, 3)) | (recorded if len(recorded) else False)
    if not recorded.any():
        raise UserError(f"{folder}: it recorded no step: let the run finish one")
    steps = int(recorded.sum())
    return ExpertLoad(source=f"{folder}: rows of {steps} steps", layers=rows.tolist())
