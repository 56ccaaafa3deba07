"""`hetermoe calibrate`: files, tables, JSON, dry runs, and every documented refusal."""

import json
from pathlib import Path
from typing import Any

import pytest

from builders import make_layout, make_model, make_profile
from command import Hetermoe, Result
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.spec.profile import Profile
from run_builders import measured_plan, scaled_inputs, write_run

RATIOS = {"new": {"attention forward": 1.25, "expert backward": 2.0}}


@pytest.fixture
def hetermoe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Hetermoe:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Hetermoe(monkeypatch, capsys)


@pytest.fixture
def planned() -> Plan:
    return measured_plan(make_layout((1, 1), (2, 2), recompute="all"))


@pytest.fixture
def run(planned: Plan, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", planned, scaled_inputs(planned.inputs, RATIOS))


def refused(result: Result, words: str) -> None:
    assert result.code == 3
    assert result.out == ""
    assert result.err.startswith("hetermoe: error: ")
    assert result.err.count("\n") == 1
    assert words in result.err


def files(folder: Path = Path()) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.is_file())


def test_a_calibrated_profile_is_written_where_plan_finds_it(hetermoe: Hetermoe, run: Path, planned: Plan) -> None:
    code, out, err = hetermoe("calibrate", run)
    assert code == 0
    rows = {" ".join(line.split()[1:3]): line.split() for line in out.splitlines() if line.startswith("  new ")}
    assert list(rows) == [
        "attention forward", "attention backward", "expert forward", "expert backward", "head 12", "optimizer 6"
    ]  # fmt: skip
    assert rows["attention forward"][3:] == ["24", "1", "1.000", "s", "1.250", "s", "1.250", "0%", "-"]
    assert "2.000" in rows["expert backward"]
    assert "iteration: measured" in out
    assert "note: links are kept" in out
    assert files() == ["profiles-calibrated/new.yaml"]
    assert err.splitlines() == [
        "hetermoe: wrote profiles-calibrated/new.yaml",
        "hetermoe: plan with --profiles profiles-calibrated --profiles OLD_FOLDER (for what it lacks)",
    ]
    profile, old = load(Profile, Path("profiles-calibrated/new.yaml")), planned.inputs.profiles["new"]
    assert (profile.device, profile.source) == ("new", "measured")
    assert profile.comment.startswith(f"calibrated from {run}: ")
    forward = [p.forward_seconds / q.forward_seconds for p, q in zip(
        profile.tables[0].attention, old.tables[0].attention, strict=True
    )]  # fmt: skip
    assert forward == pytest.approx([1.25] * 3, rel=0.01)


def test_json_is_one_object(hetermoe: Hetermoe, run: Path) -> None:
    code, out, _ = hetermoe("calibrate", run, "--json", "--output", "new")
    assert code == 0
    data = json.loads(out)
    assert (data["run"], data["origin"], data["steps"]) == (str(run), "measured", 3)
    ratios = {row["kind"]: row["ratio"] for row in data["rows"]}
    assert ratios["expert backward"] == pytest.approx(2.0, rel=0.01)
    assert ratios["expert forward"] == pytest.approx(1.0, rel=0.01)
    assert data["iteration"]["after_seconds"] == pytest.approx(data["iteration"]["measured_seconds"], rel=0.01)
    assert data["iteration"]["before_seconds"] < 0.9 * data["iteration"]["measured_seconds"]
    assert data["link"] is None
    assert data["files"] == ["new/new.yaml"] == files()


def test_a_dry_run_writes_nothing_and_shows_the_same(hetermoe: Hetermoe, run: Path) -> None:
    dry = hetermoe("calibrate", run, "--dry-run")
    assert (dry.code, dry.err, files()) == (0, "", [])
    assert json.loads(hetermoe("calibrate", run, "--dry-run", "--json").out)["files"] == []
    assert files() == []
    assert hetermoe("calibrate", run).out == dry.out


def test_an_emulated_run_needs_leave(hetermoe: Hetermoe, planned: Plan, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "emulated", planned, emulated_scale=0.5)
    refused(hetermoe("calibrate", folder), "emulated: an emulated run: its tasks last as long as its profiles say")
    assert files() == []
    code, out, _ = hetermoe("calibrate", folder, "--allow-emulated", "--json")
    assert code == 0
    assert [row["ratio"] for row in json.loads(out)["rows"]] == pytest.approx([1.0] * 6, rel=0.02)


def test_the_profile_that_the_run_was_planned_with_is_replaced_only_on_demand(
    hetermoe: Hetermoe, run: Path, planned: Plan
) -> None:
    original = Path("profiles-calibrated/new.yaml")
    dump(planned.inputs.profiles["new"], original)
    before = original.read_bytes()
    refused(hetermoe("calibrate", run), "profiles-calibrated/new.yaml: ")
    assert original.read_bytes() == before
    result = hetermoe("calibrate", run, "--output", "profiles-calibrated")
    assert result.code == 0
    assert "wrote profiles-calibrated/new.yaml: 1 tables replaced, 0 kept" in result.err
    assert original.read_bytes() != before


def test_tables_of_other_models_are_kept(hetermoe: Hetermoe, run: Path) -> None:
    other = make_profile("new", model=make_model(hidden_size=32, head_size=8), precision="fp32", source="measured")
    dump(other, Path("profiles-calibrated/new.yaml"))
    assert hetermoe("calibrate", run).code == 0
    tables = load(Profile, Path("profiles-calibrated/new.yaml")).tables
    assert [table.shape.hidden_size for table in tables] == [32, 64]
    assert tables[0] == other.tables[0]


def test_a_folder_that_is_no_run(hetermoe: Hetermoe, tmp_path: Path) -> None:
    refused(hetermoe("calibrate", tmp_path), "run.yaml: cannot be read (No such file")
    refused(hetermoe("calibrate", tmp_path / "none"), "none/run.yaml: cannot be read (No such file")


def test_a_run_that_is_malformed(hetermoe: Hetermoe, run: Path) -> None:
    (run / "run.yaml").write_text("kind: run\nplan: 3\n")
    refused(hetermoe("calibrate", run), "run.yaml: field plan")


def test_a_run_without_traces(hetermoe: Hetermoe, run: Path) -> None:
    for path in (run / "traces").iterdir():
        path.unlink()
    refused(hetermoe("calibrate", run), "no traces/rank*.json in this run folder: run `hetermoe train` with --trace")


def test_a_rank_without_traces(hetermoe: Hetermoe, run: Path) -> None:
    (run / "traces" / "rank1.json").unlink()
    refused(hetermoe("calibrate", run), "field traces: nothing of rank 1: calibrate from a complete run folder")


def test_traces_of_no_step(hetermoe: Hetermoe, planned: Plan, tmp_path: Path) -> None:
    refused(hetermoe("calibrate", write_run(tmp_path / "empty", planned, steps=0)), "the traces hold no task")


def test_a_broken_trace(hetermoe: Hetermoe, run: Path) -> None:
    path = run / "traces" / "rank1.json"
    path.write_text(path.read_text()[:-200])
    refused(hetermoe("calibrate", run), "rank1.json: not a trace written by hetermoe")


def test_an_output_that_cannot_be_written(hetermoe: Hetermoe, run: Path) -> None:
    Path("taken").write_text("a file")
    refused(hetermoe("calibrate", run, "--output", "taken"), "cannot be written")
    assert files() == ["taken"]


def test_an_old_file_survives_a_write_that_fails(
    hetermoe: Hetermoe, run: Path, planned: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path("out/new.yaml")
    dump(planned.inputs.profiles["new"], original)
    before = original.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hetermoe_cli.spec.files.os.fsync", full)
    refused(hetermoe("calibrate", run, "--output", "out"), "out/new.yaml: cannot be written (No space left on device)")
    assert (files(), original.read_bytes()) == (["out/new.yaml"], before)


def test_an_unreadable_file_in_the_way_stops_before_anything_is_written(hetermoe: Hetermoe, run: Path) -> None:
    Path("out").mkdir()
    Path("out/new.yaml").write_text("kind: profile\n")
    refused(hetermoe("calibrate", run, "--output", "out"), "out/new.yaml: field device")
    assert Path("out/new.yaml").read_text() == "kind: profile\n"
