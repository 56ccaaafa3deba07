"""`hetermoe bench` as a user runs it: real workers in turn, one report, and refusals before anything starts."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from builders import make_inputs, make_layout, make_model, make_plan, make_profile
from hetermoe_cli.spec.files import dump
from train_command import HETERMOE, run

MODEL = make_model(layers=2, experts=4, hidden_size=16, ffn_size=24, head_size=4)


@pytest.fixture
def plans(tmp_path: Path) -> list[Path]:
    """Two layouts for two CPU devices."""
    profile = make_profile("cpu", model=MODEL, precision="fp32", source="measured", sequence_lengths=(32,))
    inputs = make_inputs(
        (("cpu", 2),), model=MODEL, profiles={"cpu": profile}, sequence_length=32,
        global_batch_sequences=4, precision="fp32",
    )  # fmt: skip
    paths = []
    for name, layout in (("split", make_layout((2, 0), (0, 4))), ("even", make_layout((1, 1), (2, 2)))):
        paths.append(tmp_path / f"{name}.yaml")
        dump(make_plan(inputs, layout), paths[-1])
    return paths


def hetermoe(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = run(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_two_plans_in_turn(plans: list[Path], text: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench"
    options = ("--repeats", 2, "--steps", 3, "--warm-up", 1, "--data", text, "--output", output, "--json")
    done = hetermoe("bench", *plans, *options)
    found = json.loads(done.stdout)
    assert [entry["name"] for entry in found["entries"]] == ["split", "even"]
    assert (found["rounds"], found["steps"], found["emulated"]) == (2, 3, False)
    started = {
        (entry["name"], number): (Path(run) / "run.yaml").stat().st_mtime_ns
        for entry in found["entries"]
        for number, run in enumerate(entry["runs"])
    }
    assert sorted(started, key=lambda key: started[key]) == [("split", 0), ("even", 0), ("split", 1), ("even", 1)]
    kept = {path.name for path in Path(found["entries"][1]["runs"][1]).iterdir()}
    assert {"metrics.jsonl", "run.yaml", "loads", "traces"} <= kept
    assert "checkpoints" not in kept
    assert found | json.loads((output / "bench.json").read_text()) == found
    assert "round 2 of 2: even" in done.stderr
    assert "holds something already" in hetermoe("bench", *plans, *options, code=3).stderr


@pytest.mark.long
def test_an_interrupt_ends_the_bench_and_keeps_what_was_run(plans: list[Path], text: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench"
    arguments = ["bench", *plans, "--steps", 1000000, "--data", text, "--output", output]
    process = subprocess.Popen([*HETERMOE, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    metrics = output / "split/round-1/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"interrupted in {output}/split/round-1: the runs before it are kept" in errors
    assert "Traceback" not in errors
    assert not (output / "even").exists()


def test_dry_run_shows_all_runs_and_starts_none(plans: list[Path], text: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench"
    done = hetermoe("bench", *plans, "--data", text, "--output", output, "--repeats", 2, "--dry-run", "--json")
    shown = json.loads(done.stdout)
    rounds = [f"{output}/{name}/round-{number}" for number in (1, 2) for name in ("split", "even")]
    assert shown["order"] == rounds
    assert shown["first_round"]["even"]["command"][-1] == f"{output}/even/round-1/run.yaml"
    assert not output.exists()


def test_bad_input(plans: list[Path], text: Path, tmp_path: Path) -> None:
    common = ("--data", text, "--output", tmp_path / "bench")
    hetermoe("bench", code=2)
    hetermoe("bench", *plans, *common, "--steps", 3, "--warm-up", 3, code=2)
    hetermoe("bench", *plans, *common, "--time-scale", 2, code=2)
    done = hetermoe("bench", plans[0], tmp_path / "absent.yaml", *common, code=3)
    assert done.stderr.startswith("hetermoe: error: ")
    assert done.stderr.count("\n") == 1
    assert "absent.yaml: cannot be read" in done.stderr
    done = hetermoe("bench", *plans, *common, "--emulate", "--executed", "mixtral-w1", code=3)
    assert "field layers is 4, the plan's model has 2" in done.stderr
    assert not (tmp_path / "bench").exists()
