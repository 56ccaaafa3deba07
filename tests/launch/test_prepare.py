"""Where a run begins."""

from pathlib import Path

import pytest

from builders import make_plan
from hetermoe_cli.errors import UserError
from hetermoe_cli.launch import prepare as prepared
from hetermoe_cli.launch.local import write_run
from hetermoe_cli.launch.prepare import EmulateOptions, TrainOptions, prepare
from hetermoe_cli.runtime.run.saving import resume_note
from hetermoe_cli.spec.run import RunSpec


def begin(folder: Path, **options: object) -> RunSpec:
    given = {"resume": True, "emulate": EmulateOptions(), **options}
    return prepare(make_plan(), Path("plan.yaml"), TrainOptions(folder / "run", **given))  # type: ignore[arg-type]


def test_what_died_before_its_first_checkpoint_begins_again_when_it_is_resumed(tmp_path: Path) -> None:
    write_run(begin(tmp_path, resume=False))
    (tmp_path / "run/metrics.jsonl").write_text('{"event": "step", "step": 0}\n')
    run = begin(tmp_path)
    assert (run.resume_from, run.start_step) == (None, 0)
    assert resume_note(run) == f"{tmp_path / 'run'}: no checkpoint to resume from: the run begins at step 0"
    with pytest.raises(UserError, match="holds a run already: continue it with --resume"):
        begin(tmp_path, resume=False)


def test_traces_of_an_earlier_start_do_not_stay_beside_another_plan(tmp_path: Path) -> None:
    """They may be of more ranks than the run has now, and `calibrate` reads all there are."""
    traces = tmp_path / "run/traces"
    traces.mkdir(parents=True)
    (traces / "rank0.json").touch()
    (traces / "rank7.json").touch()
    write_run(begin(tmp_path, resume=False))
    assert not list(traces.iterdir())


def test_it_begins_with_the_weights_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_check_weights", lambda *_: None)
    write_run(begin(tmp_path, resume=False, weights=tmp_path / "given"))
    assert begin(tmp_path).weights_from == str(tmp_path / "given")
    assert begin(tmp_path, weights=tmp_path / "other").weights_from == str(tmp_path / "other")
    assert begin(tmp_path, resume=False).weights_from is None
