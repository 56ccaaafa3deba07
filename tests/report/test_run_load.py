"""The load of a run folder is the sum over its recorded steps, ranks and micro-batches; broken folders are refused."""

from pathlib import Path

import numpy as np
import pytest

from builders import make_layout
from hetermoe_cli.errors import UserError
from hetermoe_cli.report.run_load import SAMPLES, read_load
from hetermoe_cli.runtime.run.recorder import load_path
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.load import ExpertLoad
from run_builders import measured_plan, write_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two ranks that attend; 2 layers of 4 experts."""
    return write_run(tmp_path / "run", measured_plan(make_layout((1, 1), (2, 2))))


def test_all_ranks_steps_and_micro_batches_count(folder: Path) -> None:
    counts = [np.load(load_path(folder, rank)) for rank in (0, 1)]
    found = read_load(folder)
    assert np.array(found.layers) == pytest.approx(sum(c.sum(axis=(0, 2)) for c in counts))
    assert found.source == f"{folder}: rows of {len(counts[0])} steps"


def test_samples_are_single_steps_from_all_over_the_run(folder: Path) -> None:
    few = sum(np.load(load_path(folder, rank)).sum(axis=2) for rank in (0, 1))
    assert np.array(read_load(folder).samples) == pytest.approx(few)
    for rank in (0, 1):
        steps = np.arange(1, 4 * SAMPLES + 1, dtype=np.int32)
        np.save(load_path(folder, rank), np.broadcast_to(steps[:, None, None, None], (len(steps), 2, 2, 4)))
    found = np.array(read_load(folder).samples)[:, 0, 0] / 4  # two ranks and two micro-batches
    assert found.tolist() == [4 * part + 3 for part in range(SAMPLES)]


def test_steps_that_were_not_run_do_not_count(folder: Path) -> None:
    counts = np.load(load_path(folder, 0))
    for rank in (0, 1):
        padded = np.concatenate([np.load(load_path(folder, rank)), np.zeros_like(counts)])
        np.save(load_path(folder, rank), padded)
    assert read_load(folder).source.endswith(f"rows of {len(counts)} steps")


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    load = ExpertLoad(source="by hand", layers=[[1, 2], [2, 1]])
    dump(load, tmp_path / "load.yaml")
    assert read_load(tmp_path / "load.yaml") == load


def test_broken_runs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run.yaml in this folder"):
        read_load(tmp_path)
    path = load_path(folder, 1)
    np.save(path, np.zeros((2, 3), dtype=np.int32))
    with pytest.raises(UserError, match="not the expert rows of this run"):
        read_load(folder)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="not the expert rows of this run"):
        read_load(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"rank1\.npy"):
        read_load(folder)
    for rank in (0, 1):
        np.save(load_path(folder, rank), np.zeros((2, 2, 2, 4), dtype=np.int32))
    with pytest.raises(UserError, match="recorded no step"):
        read_load(folder)
