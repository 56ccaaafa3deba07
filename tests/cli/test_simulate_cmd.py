"""`hetermoe simulate`: tables, JSON, schedule, traces, pictures, comparison with a run, and errors."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import make_inputs, make_layout, make_plan, make_profile, parse_schedule, sequential
from command import Hetermoe, Result
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.layout import LayerPlacement, Layout, PipelineStage
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.trace import Trace, read_trace


@pytest.fixture
def plan_file(plan: Plan, tmp_path: Path) -> Path:
    dump(plan, tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def test_tables(hetermoe: Hetermoe, plan_file: Path) -> None:
    code, out, err = hetermoe("simulate", plan_file)
    assert (code, err) == (0, "")
    assert "simulated (modelled profiles): 34.06 s an iteration, 3.758 tokens/s" in out
    assert "critical resource: rank 1 (old), compute: 91.2% occupied" in out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("0 ", "1 "))]
    assert rows[0][:4] == ["0", "new", "attention", "41.0%"]
    assert rows[1][:4] == ["1", "old", "experts", "91.2%"]
    assert "crossing" not in out
    assert "30.72 s" in out  # 3 x 2 layers x 2 micro-batches x 4 experts x 32 rows x 0.02 s


def test_pipeline_stages(hetermoe: Hetermoe, tmp_path: Path) -> None:
    placement = [LayerPlacement(experts=[[0, 1, 2, 3], []]), LayerPlacement(experts=[[], [0, 1, 2, 3]])]
    layout = Layout(
        schedule=sequential(2),
        sequences_per_rank=[1, 1],
        placement=placement,
        pipeline=[PipelineStage(layers=1, ranks=[0]), PipelineStage(layers=1, ranks=[1])],
    )
    dump(make_plan(make_inputs(global_batch_sequences=2), layout), tmp_path / "plan.yaml")
    picture = tmp_path / "picture.svg"
    code, out, err = hetermoe("simulate", tmp_path / "plan.yaml", "--picture", picture)
    assert (code, err) == (0, "")
    assert "2 pipeline stages, sequential, R = 2" in out
    assert "crossing" in out
    for text in ("to next stage", "to stage before", "to and from other pipeline stages"):
        assert text in picture.read_text()


def test_json_is_one_object_with_the_plans_prediction(hetermoe: Hetermoe, plan_file: Path, plan: Plan) -> None:
    code, out, err = hetermoe("simulate", plan_file, "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["origin"] == "simulated (modelled profiles)"
    assert data["iteration_seconds"] == plan.predicted.iteration_seconds
    assert data["tokens_per_second"] == plan.predicted.tokens_per_second
    assert [rank["busy_share"] for rank in data["ranks"]] == plan.predicted.busy_share_per_rank
    assert data["ranks"][1]["seconds"]["expert forward"] == pytest.approx(4 * 4 * 32 * 0.02)
    assert data["critical"] == {"rank": 1, "device": "old", "lane": "compute", "share": pytest.approx(0.912, abs=1e-3)}
    assert "schedule" not in data
    assert "comparison" not in data


def test_synchronisation_makes_no_resource_critical(hetermoe: Hetermoe, tmp_path: Path) -> None:
    link = Link(bandwidth_gigabytes_per_second=1e-6, latency_microseconds=0.0)  # the all-reduce takes all the time
    inputs = make_inputs(network=link, global_batch_sequences=4)
    dump(make_plan(inputs, make_layout((1, 1), (0, 0), replicated=4)), tmp_path / "plan.yaml")
    data = json.loads(hetermoe("simulate", tmp_path / "plan.yaml", "--json").out)
    assert data["ranks"][0]["seconds"]["synchronise"] > 0.9 * data["iteration_seconds"]
    assert data["critical"]["share"] == max(rank["busy_share"] for rank in data["ranks"])


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (("measured", "measured"), "simulated (measured profiles)"),
        (("measured", "modelled"), "simulated (measured and modelled profiles)"),
    ],
)
def test_the_label_follows_the_profiles(hetermoe: Hetermoe, tmp_path: Path, sources: Any, words: str) -> None:
    profiles = {name: make_profile(name, source=source) for name, source in zip(("new", "old"), sources, strict=True)}
    dump(make_plan(make_inputs(profiles=profiles)), tmp_path / "plan.yaml")
    assert json.loads(hetermoe("simulate", tmp_path / "plan.yaml", "--json").out)["origin"] == words


def test_schedule_prints_only_its_text_form(hetermoe: Hetermoe, plan_file: Path, plan: Plan) -> None:
    code, out, _ = hetermoe("simulate", plan_file, "--schedule")
    assert code == 0
    assert str(parse_schedule(out)) == str(training_schedule(plan.layout))
    data = json.loads(hetermoe("simulate", plan_file, "--schedule", "--json").out)
    assert data["schedule"] == out


def test_trace_and_picture_files(hetermoe: Hetermoe, plan_file: Path, tmp_path: Path, plan: Plan) -> None:
    trace, picture = tmp_path / "out" / "trace.json", tmp_path / "out" / "picture.png"
    assert hetermoe("simulate", plan_file, "--trace", trace, "--picture", picture).code == 0
    assert read_trace([trace]).seconds == pytest.approx(plan.predicted.iteration_seconds)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(path.name for path in trace.parent.iterdir()) == ["picture.png", "trace.json"]


def run_folder(folder: Path, trace: Trace, factor: float, origin: Any) -> Path:
    """A run of two steps, `factor` and 1.2 x `factor` times as slow as `trace`."""
    for rank in {span.rank for span in trace.spans}:
        spans = [
            span._replace(start=span.start * slow, end=span.end * slow, step=step)
            for step, slow in enumerate((factor, 1.2 * factor), 10)
            for span in trace.spans
            if span.rank == rank
        ]
        Trace(origin, spans).write(folder / "traces" / f"rank{rank}.json")
    return folder


def run_file(folder: Path, plan: Plan, time_scale: float | None) -> None:
    """A run.yaml of `plan` as `hetermoe train` writes it."""
    data = {
        "kind": "run",
        "schema_version": 1,
        "plan": plan.model_dump(mode="json"),
        "folder": str(folder),
        "corpus_sha256": "0",
        "precision": "fp32",
        "steps": 20,
    }
    if time_scale:
        model = plan.inputs.model.model_dump(mode="json")
        data["emulation"] = {"executed": model, "sequence_length": 64, "time_scale": time_scale}
    (folder / "run.yaml").write_text(yaml.safe_dump(data))


@pytest.fixture
def predicted(hetermoe: Hetermoe, plan_file: Path, tmp_path: Path) -> Trace:
    hetermoe("simulate", plan_file, "--trace", tmp_path / "predicted.json")
    return read_trace([tmp_path / "predicted.json"])


def test_comparison_with_a_measured_run(hetermoe: Hetermoe, plan_file: Path, tmp_path: Path, predicted: Trace) -> None:
    folder = run_folder(tmp_path / "run", predicted, 1.0, "measured")
    data = json.loads(hetermoe("simulate", plan_file, "--measured", folder, "--json").out)["comparison"]
    assert data["ratio"] == pytest.approx(1.1)
    assert (data["steps"], data["origins"], data["notes"]) == (2, ["simulated", "measured"], [])
    code, out, err = hetermoe("simulate", plan_file, "--measured", folder)
    assert (code, err) == (0, "")
    assert "measured 37.47 s an iteration (median of 2 steps), simulated 34.06 s: ratio 1.100" in out


def test_comparison_with_an_emulated_run_in_nominal_seconds(
    hetermoe: Hetermoe, plan_file: Path, tmp_path: Path, predicted: Trace, plan: Plan
) -> None:
    folder = run_folder(tmp_path / "run", predicted, 0.01, "emulated")
    run_file(folder, plan, time_scale=0.01)
    data = json.loads(hetermoe("simulate", plan_file, "--measured", folder, "--json").out)["comparison"]
    assert data["ratio"] == pytest.approx(1.1)
    assert data["origins"] == ["simulated", "emulated"]
    assert data["notes"] == [
        "emulated seconds are divided by the run's time scale, 0.01",
        "the run's router is learned, the prediction assumes a balanced one",
    ]
    out = hetermoe("simulate", plan_file, "--measured", folder).out
    assert "note: emulated seconds are divided by the run's time scale, 0.01" in out


def test_single_trace_files_and_a_picture_of_both(
    hetermoe: Hetermoe, plan_file: Path, tmp_path: Path, predicted: Trace
) -> None:
    folder = run_folder(tmp_path / "run", predicted, 1.0, "measured")
    files = sorted((folder / "traces").iterdir())
    options = [word for file in files for word in ("--measured", file)]
    picture = tmp_path / "both.svg"
    result = hetermoe("simulate", plan_file, *options, "--picture", picture, "--json")
    assert json.loads(result.out)["comparison"]["only_predicted"] == 0
    text = picture.read_text()
    assert "simulated (modelled profiles): 34.06 s an iteration" in text
    assert "measured: 34.06 s an iteration (1.000 times the one above)" in text


def refused(result: Result, code: int, words: str) -> None:
    assert result.code == code
    assert result.out == ""
    assert result.err.startswith("hetermoe: error: ")
    assert result.err.count("\n") == 1
    assert words in result.err


def test_a_missing_plan(hetermoe: Hetermoe, tmp_path: Path) -> None:
    refused(hetermoe("simulate", tmp_path / "none.yaml"), 3, "none.yaml: cannot be read (No such file")


def test_a_plan_whose_input_was_edited(hetermoe: Hetermoe, plan_file: Path) -> None:
    plan_file.write_text(plan_file.read_text().replace("seed: 0", "seed: 1"))
    refused(hetermoe("simulate", plan_file), 3, "field inputs.train: its hash does not match")


def test_a_file_that_is_no_plan(hetermoe: Hetermoe, tmp_path: Path) -> None:
    dump(make_inputs().cluster, tmp_path / "cluster.yaml")
    refused(hetermoe("simulate", tmp_path / "cluster.yaml"), 3, "field kind: Input should be 'plan'")


def test_an_unknown_picture_format_is_a_usage_error(hetermoe: Hetermoe, plan_file: Path, tmp_path: Path) -> None:
    result = hetermoe("simulate", plan_file, "--picture", tmp_path / "picture.gif", "--trace", tmp_path / "t.json")
    assert result.code == 2
    assert "must end in .png, .svg, .pdf" in result.err
    assert not (tmp_path / "t.json").exists()


def test_without_matplotlib_nothing_is_written(
    hetermoe: Hetermoe, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = hetermoe("simulate", plan_file, "--picture", tmp_path / "p.png", "--trace", tmp_path / "t.json")
    refused(result, 3, "pictures need matplotlib: pip install 'hetermoe[plot]'")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


@pytest.mark.parametrize("option", ["--trace", "--picture"])
def test_an_output_that_cannot_be_written(hetermoe: Hetermoe, plan_file: Path, tmp_path: Path, option: str) -> None:
    target = tmp_path / "folder.png"
    target.mkdir()
    refused(hetermoe("simulate", plan_file, option, target, "--json"), 3, "folder.png: cannot be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "plan.yaml"]


def test_a_run_folder_without_traces(hetermoe: Hetermoe, plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    refused(hetermoe("simulate", plan_file, "--measured", tmp_path / "run"), 3, "no traces/rank*.json in this run")


def test_an_emulated_trace_without_its_run(
    hetermoe: Hetermoe, plan_file: Path, tmp_path: Path, predicted: Trace
) -> None:
    folder = run_folder(tmp_path / "run", predicted, 0.01, "emulated")
    refused(hetermoe("simulate", plan_file, "--measured", folder), 3, "emulated, but no run.yaml tells its time scale")


def test_a_run_of_another_plan(hetermoe: Hetermoe, plan_file: Path, tmp_path: Path, predicted: Trace) -> None:
    folder = run_folder(tmp_path / "run", predicted, 1.0, "measured")
    run_file(folder, make_plan(make_inputs(nodes=(("old", 1), ("new", 1)))), None)
    refused(hetermoe("simulate", plan_file, "--measured", folder), 3, "run.yaml: field plan: another plan")


def test_a_trace_with_more_ranks_than_the_plan(
    hetermoe: Hetermoe, plan_file: Path, tmp_path: Path, predicted: Trace
) -> None:
    Trace("measured", [span._replace(rank=2) for span in predicted.spans]).write(tmp_path / "t.json")
    refused(hetermoe("simulate", plan_file, "--measured", tmp_path / "t.json"), 3, "the plan has ranks 0 to 1")


def test_a_placement_picture(hetermoe: Hetermoe, plan_file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "out" / "placement.svg"
    assert hetermoe("simulate", plan_file, "--placement-picture", picture).code == 0
    text = picture.read_text()
    assert "plan: synthetic on synthetic, zebra, R = 2" in text
    assert "0: 1 sequence" in text
    result = hetermoe("simulate", plan_file, "--placement-picture", tmp_path / "placement.gif")
    assert result.code == 2
    assert "Invalid value for --placement-picture" in result.err
