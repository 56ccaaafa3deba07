"""`hetermoe train` as a user runs it: real workers, files, signals, and every documented failure."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from builders import make_inputs, make_layout, make_model, make_plan, make_profile
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.plan import Plan
from train_command import HETERMOE, run

MODEL = make_model(layers=2, experts=4, hidden_size=16, ffn_size=24, head_size=4)
BALANCED = MODEL.model_copy(
    update={
        "shared_experts": 1, "router_score": "sigmoid", "router_scale": 2.5, "router_z_loss": 0.01,
        "router_balance": "bias", "router_bias_rate": 0.01, "router_auxiliary_loss": 0.01,
    }
)  # fmt: skip


def cpu_plan(steps: int = 12, model: ModelConfig = MODEL, **layout: object) -> Plan:
    profile = make_profile("cpu", model=model, precision="fp32", source="measured", sequence_lengths=(32,))
    inputs = make_inputs(
        (("cpu", 2),), model=model, profiles={"cpu": profile}, sequence_length=32,
        global_batch_sequences=4, precision="fp32",
    )  # fmt: skip
    train = inputs.train.model_copy(update={"steps": steps, "warmup_steps": 2, "learning_rate": 3e-3})
    arguments = {"sequences": (2, 0), "hosted": (1, 2), "replicated": 1, "micro_batches": 2, **layout}
    return make_plan(inputs.model_copy(update={"train": train}), make_layout(**arguments))  # type: ignore[arg-type]


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    dump(cpu_plan(), tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def hetermoe(*arguments: object, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = run(*arguments)
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    return done


def metrics(folder: Path, event: str = "step") -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def refused(*arguments: object, code: int = 3) -> str:
    """Run, expect `code` and exactly one line that says why."""
    done = hetermoe(*arguments, check=code)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("hetermoe: error: ")
    assert not done.stdout
    return lines[0]


def test_dry_run_starts_nothing_and_shows_what_runs(plan_file: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = hetermoe("train", plan_file, "--run-folder", folder, "--data", text, "--dry-run", "--json")
    shown = json.loads(done.stdout)
    assert shown["workers"] == 2
    assert shown["command"][-1] == str(folder / "run.yaml")
    assert shown["run"]["steps"] == 12
    assert not folder.exists()


def test_run_then_resume_is_bit_exact(plan_file: Path, text: Path, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    common = ("--data", text, "--checkpoint-every", 6, "--validate-every", 6)
    done = hetermoe("train", plan_file, "--run-folder", whole, *common, "--json")
    summary = json.loads(done.stdout)
    steps = metrics(whole)
    assert [line["step"] for line in steps] == list(range(12))
    assert summary["last_loss"] == steps[-1]["loss"] < summary["first_loss"]
    assert [line["step"] for line in metrics(whole, "validation")] == [5, 11]
    assert {path.name for path in (whole / "traces").iterdir()} == {"rank0.json", "rank1.json"}

    (half / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints/step-00000006", half / "checkpoints/step-00000006")
    (half / "checkpoints/latest").write_text("step-00000006\n")
    resumed = hetermoe("train", plan_file, "--run-folder", half, *common, "--resume")
    assert "note:" not in resumed.stderr
    assert [line["loss"] for line in metrics(half)] == [line["loss"] for line in steps[6:]]
    for rank in (0, 1):
        shard = f"checkpoints/step-00000012/rank-{rank:05d}.safetensors"
        assert (half / shard).read_bytes() == (whole / shard).read_bytes()


def test_ranks_that_attend_in_turn_train_calibrate_and_resume(text: Path, tmp_path: Path) -> None:
    plain = cpu_plan(4, replicated=0, hosted=(1, 3))
    layout = plain.layout.model_dump() | {"sequences_per_rank": [2, 2], "shifts": [[0], [1]]}
    plans = {"plain": plain, "shifts": make_plan(plain.inputs, Layout.model_validate(layout))}
    for name, plan in plans.items():
        dump(plan, tmp_path / f"{name}.yaml")
        options = ("--data", text, "--validate-every", 2, "--checkpoint-every", 2)
        hetermoe("train", tmp_path / f"{name}.yaml", "--run-folder", tmp_path / name, *options)
    for event in ("step", "validation"):
        losses = {name: [line["loss"] for line in metrics(tmp_path / name, event)] for name in plans}
        assert losses["shifts"] == pytest.approx(losses["plain"], rel=1e-4)
    done = hetermoe("calibrate", tmp_path / "shifts", "--dry-run", "--json")
    assert {row["tasks"] for row in json.loads(done.stdout)["rows"] if row["kind"] == "head"} == {2}
    options = ("--data", text, "--run-folder", tmp_path / "shifts", "--resume", "--steps", 6)
    hetermoe("train", tmp_path / "plain.yaml", *options)
    assert [line["step"] for line in metrics(tmp_path / "shifts")] == list(range(6))


@pytest.mark.long
def test_balanced_routers_resume_bit_exact_and_under_another_layout(text: Path, tmp_path: Path) -> None:
    """Losses of the router are told apart, loads of every layer are in the metrics, and the biases are saved
    (after an odd number of steps, none of them can be back at 0)."""
    plans = {"first": cpu_plan(5, BALANCED, sequences=(1, 1)), "then": cpu_plan(5, BALANCED, sequences=(2, 0))}
    for name, plan in plans.items():
        dump(plan, tmp_path / f"{name}.yaml")
    whole, half = tmp_path / "whole", tmp_path / "half"
    common = ("--data", text, "--checkpoint-every", 3)
    hetermoe("train", tmp_path / "first.yaml", "--run-folder", whole, *common)
    for folder, plan in ((half, "first"), (tmp_path / "moved", "then")):
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copytree(whole / "checkpoints/step-00000003", folder / "checkpoints/step-00000003")
        hetermoe("train", tmp_path / f"{plan}.yaml", "--run-folder", folder, *common, "--resume")
    steps = metrics(whole)
    assert [line["loss"] for line in metrics(half)] == [line["loss"] for line in steps[3:]]
    for rank in (0, 1):
        shard = f"checkpoints/step-00000005/rank-{rank:05d}.safetensors"
        assert (half / shard).read_bytes() == (whole / shard).read_bytes()
    saved = load_file(whole / "checkpoints/step-00000005/rank-00000.safetensors")
    assert all(saved[f"layers.{layer}.gate.selection_bias"].any() for layer in range(2))
    assert metrics(tmp_path / "moved")[0]["loss"] == pytest.approx(steps[3]["loss"], rel=1e-5)
    for line in steps:
        highest, lowest = np.array(line["expert_load_highest"]), np.array(line["expert_load_lowest"])
        assert highest.shape == lowest.shape == (2,)
        assert (highest >= 1).all()
        assert (lowest <= 1).all()
        assert line["expert_imbalance"] == pytest.approx(highest.mean(), abs=1e-4)
        assert 0 < line["auxiliary_loss"] < 0.1 > line["z_loss"] > 0  # type: ignore[operator]


def test_resume_under_another_layout(plan_file: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hetermoe("train", plan_file, "--run-folder", folder, "--data", text, "--steps", 4)
    other = tmp_path / "other.yaml"
    dump(cpu_plan(hosted=(2, 2), sequences=(1, 1), replicated=0, schedule="sequential"), other)
    done = hetermoe("train", other, "--run-folder", folder, "--data", text, "--resume", "--steps", 6)
    assert "note: resuming with another steps" in done.stderr
    assert [line["step"] for line in metrics(folder)] == list(range(6))


def test_emulated_run_is_labelled(tmp_path: Path, text: Path) -> None:
    nominal = make_model(layers=2, experts=4)
    profiles = {
        name: make_profile(
            name,
            model=nominal,
            attention_seconds=1e-3 * slow,
            expert_seconds=2e-5 * slow,
            head_seconds=1e-5,
            optimizer_seconds_per_parameter=1e-9,
        )
        for name, slow in (("new", 1), ("old", 2))
    }
    plan = make_plan(make_inputs(model=nominal, profiles=profiles), make_layout())
    dump(plan, tmp_path / "plan.yaml")
    options = ("--emulate", "--executed-sequence-length", 32, "--steps", 4, "--data", text, "--router", "balanced")
    done = hetermoe("train", tmp_path / "plan.yaml", "--run-folder", tmp_path / "run", *options)
    assert "emulated" in done.stdout
    assert all(line["emulated"] for line in metrics(tmp_path / "run"))
    trace = json.loads((tmp_path / "run/traces/rank0.json").read_text())
    assert trace["otherData"]["origin"] == "emulated"


def start(plan: Path, folder: Path, text: Path) -> subprocess.Popen[str]:
    """A run that never ends by itself, past its third step."""
    arguments = ["train", str(plan), "--run-folder", str(folder), "--data", str(text), "--steps", "1000000"]
    process = subprocess.Popen([*HETERMOE, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return process


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_interrupt_saves_and_leaves_with_130(plan_file: Path, text: Path, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "run"
    process = start(plan_file, folder, text)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "saved at step" in errors
    saved = json.loads((folder / "status.json").read_text())["saved_step"]
    assert saved == metrics(folder)[-1]["step"] + 1  # type: ignore[operator]
    assert (folder / f"checkpoints/step-{saved:08d}/manifest.json").exists()


def test_dead_worker_ends_the_run_with_its_error(plan_file: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(plan_file, folder, text)
    workers = subprocess.run(["pgrep", "-f", str(folder / "run.yaml")], capture_output=True, text=True).stdout.split()
    victims = [pid for pid in map(int, workers) if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    os.kill(victims[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 6
    assert "worker of rank 1 died (signal SIGKILL)" in errors
    assert not (folder / "status.json").exists()


def test_a_worker_that_hears_nothing_is_not_waited_for(plan_file: Path, text: Path, tmp_path: Path) -> None:
    """Stopped, it hears neither gloo nor torch's SIGTERM, after which torch would wait 30 s."""
    folder = tmp_path / "run"
    process = start(plan_file, folder, text)
    workers = subprocess.run(["pgrep", "-f", str(folder / "run.yaml")], capture_output=True, text=True).stdout.split()
    ranks = {0: b"RANK=0", 1: b"RANK=1"}
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in map(int, workers)}
    deaf, victim = (next(pid for pid, found in environments.items() if ranks[rank] in found) for rank in (0, 1))
    os.kill(deaf, signal.SIGSTOP)
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=25)
    assert process.returncode == 6
    assert "worker of rank 1 died (signal SIGKILL)" in errors


def test_existing_run_is_not_overwritten(plan_file: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("kept\n")
    assert "--resume" in refused("train", plan_file, "--run-folder", tmp_path / "run", "--data", text)
    assert (tmp_path / "run/metrics.jsonl").read_text() == "kept\n"


def test_corrupt_checkpoint(plan_file: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ("train", plan_file, "--run-folder", folder, "--data", text)
    hetermoe(*options, "--steps", 3)
    shard = folder / "checkpoints/step-00000003/rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = refused(*options, "--steps", 5, "--resume")
    assert "corrupt" in message
    assert str(shard) in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    shard.unlink()
    assert "missing" in refused(*options, "--steps", 5, "--resume")


@pytest.mark.long
def test_a_torn_last_line_of_the_metrics_does_not_stop_a_resume(plan_file: Path, text: Path, tmp_path: Path) -> None:
    options = ("train", plan_file, "--run-folder", tmp_path / "run", "--data", text)
    hetermoe(*options, "--steps", 2)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    hetermoe(*options, "--steps", 3, "--resume")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.long
def test_a_run_that_died_before_its_first_checkpoint_begins_again(plan_file: Path, text: Path, tmp_path: Path) -> None:
    options = ("train", plan_file, "--run-folder", tmp_path / "run", "--data", text)
    hetermoe(*options, "--steps", 3)
    before = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    done = hetermoe(*options, "--steps", 2, "--resume")
    assert "note: " in done.stderr
    assert "no checkpoint to resume from: the run begins at step 0" in done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1]
    assert metrics(tmp_path / "run")[0]["loss"] == before[0]["loss"]
    assert metrics(tmp_path / "run")[0]["time"] > before[2]["time"]  # type: ignore[operator]


def test_divergence_ends_the_run_in_one_line_and_keeps_good_checkpoints(text: Path, tmp_path: Path) -> None:
    plan = cpu_plan()
    train = plan.inputs.train.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0})
    inputs = plan.inputs.model_copy(update={"train": train})
    dump(plan.model_copy(update={"inputs": inputs, "inputs_sha256": inputs.hashes()}), tmp_path / "plan.yaml")
    options = ("--run-folder", tmp_path / "run", "--data", text, "--checkpoint-every", 1)
    done = hetermoe("train", tmp_path / "plan.yaml", *options, check=3)
    assert "diverged" in done.stderr
    assert (tmp_path / "run/checkpoints/latest").exists()
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


@pytest.mark.long
def test_a_save_that_fails_after_an_interrupt_is_told(plan_file: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(plan_file, folder, text)
    (folder / "checkpoints").write_text("in the way")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "not saved" in errors
    assert "checkpoints" in errors


def test_bad_plans(plan_file: Path, text: Path, tmp_path: Path) -> None:
    good = plan_file.read_text()
    bad = tmp_path / "bad.yaml"
    for wrong, expected in (
        (good.replace("schedule:", "schedule: [", 1), "malformed YAML"),
        (good + "surplus: 1\n", "field surplus: unknown field"),
        (good.replace("schema_version: 1", "schema_version: 99", 1), "schema_version is 99"),
        (good.replace("learning_rate: 0.003", "learning_rate: 0.004"), "field inputs.train: its hash does not match"),
        (good.replace("optimizer_seconds_per_parameter: 1.0e-06", "optimizer_seconds_per_parameter: 2.0e-06"),
         "field inputs.profiles.cpu: its hash does not match"),
    ):  # fmt: skip
        assert wrong != good
        bad.write_text(wrong)
        message = refused("train", bad, "--run-folder", tmp_path / "run", "--data", text)
        assert expected in message
        assert str(bad) in message
    assert not (tmp_path / "run").exists()


def test_wrong_device_and_modelled_profiles(text: Path, tmp_path: Path) -> None:
    plan = cpu_plan()
    for update, expected in (
        ({"source": "modelled"}, "modelled, not measured"),
        ({"facts": {"product": "Abacus 9000"}}, "measured on 'Abacus 9000'"),
        ({"accelerator": "cuda", "facts": {"product": "NVIDIA A40"}}, "measured on 'NVIDIA A40'"),
    ):
        profile = plan.inputs.profiles["cpu"].model_validate(
            plan.inputs.profiles["cpu"].model_dump(exclude={"facts"}) | {"facts": {}} | update
        )
        inputs = plan.inputs.model_copy(update={"profiles": {"cpu": profile}})
        dump(plan.model_copy(update={"inputs": inputs, "inputs_sha256": inputs.hashes()}), tmp_path / "plan.yaml")
        message = refused("train", tmp_path / "plan.yaml", "--run-folder", tmp_path / "run", "--data", text)
        assert expected in message
        assert "hetermoe profile" in message


def test_unreadable_text(plan_file: Path, tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, expected in (("binary.txt", "not UTF-8 text"), ("absent.txt", "cannot be read")):
        message = refused("train", plan_file, "--run-folder", tmp_path / "run", "--data", tmp_path / name)
        assert expected in message
        assert name in message


def test_usage_errors(plan_file: Path, tmp_path: Path) -> None:
    hetermoe("train", check=2)
    hetermoe("train", plan_file, "--steps", "zero", check=2)
    hetermoe("train", plan_file, "--time-scale", "3", check=2)
    for scale in ("0", "nan", "inf"):
        done = hetermoe("train", plan_file, "--emulate", "--time-scale", scale, "--dry-run", check=2)
        assert "must be a positive number" in done.stderr
    assert "absent.yaml: cannot be read" in refused("train", tmp_path / "absent.yaml")


def test_world_size_of_the_launcher_must_match(plan_file: Path, text: Path, tmp_path: Path) -> None:
    """A worker started by another launcher with another number of workers says so, and leaves with code 3."""
    shown = json.loads(
        hetermoe("train", plan_file, "--run-folder", tmp_path / "run", "--data", text, "--dry-run", "--json").stdout
    )
    run_file = tmp_path / "run.yaml"
    run_file.write_text(json.dumps(shown["run"]))  # JSON is YAML
    command = [sys.executable, "-m", "hetermoe_cli.runtime.worker", str(run_file)]
    alone = os.environ | {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "world size is 3, the plan has 2 ranks" in done.stderr
