"""Peaks of memory of a run folder against its plan's."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from hetermoe_cli.errors import UserError
from hetermoe_cli.report.run_memory import memory_table, run_memory
from hetermoe_cli.runtime.run.recorder import memory_path
from run_builders import measured_plan, write_run


def write(folder: Path, rank: int, **values: int) -> None:
    path = memory_path(folder, rank)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))


def test_predicted_against_measured(tmp_path: Path) -> None:
    plan = measured_plan()
    folder = write_run(tmp_path / "run", plan)
    predicted = [memory.total_bytes - memory.framework_bytes for memory in plan.memory]
    write(folder, 0, start_bytes=5_000_000, step_peak_bytes=int(1.5 * predicted[0]), peak_bytes=2 * predicted[0])
    found = run_memory(folder)
    assert found.predicted_bytes == predicted
    assert found.measured_bytes == [int(1.5 * predicted[0]), None]
    assert found.whole_run_bytes == [2 * predicted[0], None]
    assert found.start_up_bytes == [None, None]  # of a run that did not note it yet
    write(folder, 0, start_bytes=5, step_peak_bytes=7, peak_bytes=8, start_up_peak_bytes=6)
    assert run_memory(folder).start_up_bytes == [6, None]
    assert json.loads(json.dumps(found.as_dict()))["start_bytes"] == [5_000_000, None]
    console = Console(width=160, record=True, quiet=False)
    console.print(memory_table(found))
    text = console.export_text()
    assert "(+50.0 %)" in text
    assert "not measured" in text


def test_an_emulated_run_is_compared_with_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", measured_plan(), emulated_scale=2.0)
    assert run_memory(folder).predicted_bytes is None


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", measured_plan())
    write(folder, 1, start_bytes=1)
    with pytest.raises(UserError, match=r"memory/rank1\.json: not the peaks of memory of this run"):
        run_memory(folder)
