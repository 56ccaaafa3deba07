"""Which expert load a comparison replays: the recorded one, also where a balanced router ran a plan for a load."""

from pathlib import Path

import pytest

from builders import make_layout, make_plan
from hetermoe_cli.report.measured import read_measured
from hetermoe_cli.spec.load import ExpertLoad
from hetermoe_cli.spec.plan import Plan
from run_builders import measured_plan, write_run


def plan(*, loaded: bool) -> Plan:
    balanced = measured_plan(make_layout((1, 1), (2, 2)))
    if not loaded:
        return balanced
    load = ExpertLoad(layers=[[2, 1, 1, 1]] * 2)
    return make_plan(balanced.inputs.model_copy(update={"expert_load": load}), balanced.layout)


@pytest.mark.parametrize(("router", "loaded", "replayed"), [
    ("learned", False, True), ("learned", True, True), ("balanced", True, True), ("balanced", False, False),
])  # fmt: skip
def test_recorded_rows_are_replayed_where_the_prediction_assumes_others(
    tmp_path: Path, router: str, loaded: bool, replayed: bool
) -> None:
    trained = plan(loaded=loaded)
    folder = write_run(tmp_path / "run", trained, router=router)  # type: ignore[arg-type]
    found = read_measured([folder], trained)
    assert (found.load is not None) == replayed
    assert any(f"that the {router} router sent" in note for note in found.notes) == replayed


def test_without_recorded_rows_the_note_tells_what_is_assumed(tmp_path: Path) -> None:
    trained = plan(loaded=True)
    folder = write_run(tmp_path / "run", trained, loads=False)
    assert (
        "the run's router is learned, the prediction assumes the plan's expert load"
        in read_measured([folder], trained).notes
    )
