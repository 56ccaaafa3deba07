"""`hetermoe plan --load`: a file or a run folder; what the plan says of it; and every documented failure."""

import json
from pathlib import Path

import pytest
import yaml
from test_plan_cmd import arguments, files, hetermoe, refused

from builders import make_layout
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.plan import Plan
from run_builders import measured_plan, write_run

__all__ = ["files"]
LOAD = {"kind": "expert_load", "layers": [[40, 40, 10, 10], [10, 30, 30, 30]]}


@pytest.fixture
def load_file(tmp_path: Path) -> Path:
    """2 layers of 4 experts."""
    path = tmp_path / "load.yaml"
    path.write_text(yaml.safe_dump(LOAD))
    return path


def test_plan_and_replay_under_a_load(files: dict[str, Path], load_file: Path) -> None:
    found = json.loads(hetermoe(*arguments(files), "--load", load_file, "--json").stdout)
    assert found["load"]["imbalance_per_layer"] == pytest.approx([1.6, 1.2])
    assert found["load"]["worst_layer"] == 0
    assert found["predicted"]["iteration_seconds"] <= found["load"]["numbered_iteration_seconds"] * (1 + 1e-9)
    assert found["inputs"]["expert_load"]["layers"] == LOAD["layers"]
    assert len(found["inputs_sha256"]["expert_load"]) == 64
    assert found["bound"]["exact_over"] == "not solved"
    assert any("1.60 times the mean in layer 0" in note for note in found["notes"])
    assert load(Plan, files["output"]).model_dump(mode="json") == found
    replay = json.loads(hetermoe("simulate", files["output"], "--json").stdout)
    assert replay["iteration_seconds"] == pytest.approx(found["predicted"]["iteration_seconds"])


def test_table_tells_the_imbalance(files: dict[str, Path], load_file: Path) -> None:
    text = hetermoe(*arguments(files), "--load", load_file).stdout
    assert "hottest over mean by layer: 1.60, 1.20 (worst: layer 0)" in text
    assert "best plan for a balanced router" in text


def test_a_run_folder_is_a_load(files: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", measured_plan(make_layout((1, 1), (2, 2))))
    found = json.loads(hetermoe(*arguments(files), "--load", run, "--json").stdout)
    assert found["inputs"]["expert_load"]["source"].startswith(str(run))
    assert max(found["load"]["imbalance_per_layer"]) > 1


def test_bad_loads(files: dict[str, Path], load_file: Path, tmp_path: Path) -> None:
    for wrong, expected in (
        ({**LOAD, "layers": LOAD["layers"][:1]}, "1 layers of 4 experts, model synthetic has 2 of 4"),
        ({**LOAD, "layers": [[1, 1, 1]] * 2}, "2 layers of 3 experts"),
        ({**LOAD, "layers": [[9, 1, 1, 1]] * 2}, "field layers.0.0: 75% of the layer's rows"),
        ({**LOAD, "layers": [[1, 2, 3], [1]]}, "layers.1"),
        ({**LOAD, "colour": "red"}, "field colour: unknown field"),
    ):
        load_file.write_text(yaml.safe_dump(wrong))
        message = refused(files, "--load", load_file)
        assert expected in message
        assert str(load_file) in message
    assert "cannot be read" in refused(files, "--load", tmp_path / "absent.yaml")
    assert "no run.yaml" in refused(files, "--load", tmp_path)
