"""`hetermoe train` in fp16 and bf16 from a plan file; resuming with the loss scale, damaged or not."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import train_command
from builders import make_inputs, make_layout, make_model, make_plan, make_profile
from hetermoe_cli.model.weights.checkpoint import load_tensors, read_manifest
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.profile import Precision
from train_command import events

MODEL = make_model(layers=2, experts=4, hidden_size=16, ffn_size=24, head_size=4)
STEPS = 8


def plan_file(folder: Path, precision: Precision) -> Path:
    """Attention on one CPU worker, experts on both."""
    profile = make_profile("cpu", model=MODEL, precision=precision, source="measured", sequence_lengths=(32,))
    inputs = make_inputs(
        (("cpu", 2),), model=MODEL, profiles={"cpu": profile}, sequence_length=32,
        global_batch_sequences=4, precision=precision,
    )  # fmt: skip
    train = inputs.train.model_copy(update={"steps": STEPS, "warmup_steps": 2, "learning_rate": 3e-3})
    plan = make_plan(inputs.model_copy(update={"train": train}), make_layout((2, 0), (1, 3), micro_batches=2))
    dump(plan, folder / "plan.yaml")
    return folder / "plan.yaml"


def train(plan: Path, folder: Path, text: Path, *options: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return train_command.train(plan, "--run-folder", folder, "--data", text, *options, code=code)


def test_two_device_types_of_one_machine_train_each_in_its_own_precision(tmp_path: Path, text: Path) -> None:
    kinds: dict[str, Precision] = {"new": "bf16", "old": "fp16"}
    profiles = {
        name: make_profile(name, model=MODEL, precision=precision, source="measured", sequence_lengths=(32,))
        for name, precision in kinds.items()
    }
    inputs = make_inputs(
        (("new", 1), ("old", 1)), model=MODEL, profiles=profiles, sequence_length=32, global_batch_sequences=4,
        precision="bf16",
    )  # fmt: skip
    nodes = [node.model_copy(update={"machine": "here"}) for node in inputs.cluster.nodes]
    train_spec = inputs.train.model_copy(
        update={"steps": STEPS, "warmup_steps": 2, "learning_rate": 3e-3, "device_precision": {"old": "fp16"}}
    )
    cluster = inputs.cluster.model_copy(update={"nodes": nodes})
    inputs = inputs.model_copy(update={"cluster": cluster, "train": train_spec})
    dump(make_plan(inputs, make_layout((1, 1), (3, 1), micro_batches=2)), tmp_path / "plan.yaml")
    summary = json.loads(train(tmp_path / "plan.yaml", tmp_path / "run", text, "--json").stdout)
    assert summary["last_loss"] < summary["first_loss"]
    assert events(tmp_path / "run", "step")[0]["loss_scale"] == 2.0**16  # as one rank computes in fp16


def test_bf16_trains_without_a_loss_scale(tmp_path: Path, text: Path) -> None:
    done = train(plan_file(tmp_path, "bf16"), tmp_path / "run", text, "--json")
    summary = json.loads(done.stdout)
    assert summary["last_loss"] < summary["first_loss"]
    assert "loss_scale" not in events(tmp_path / "run", "step")[0]
    assert "loss_scale" not in read_manifest(tmp_path / f"run/checkpoints/step-{STEPS:08d}").extra


@pytest.mark.long
def test_fp16_resumes_bit_exactly_with_its_loss_scale(tmp_path: Path, text: Path) -> None:
    plan, whole, half = plan_file(tmp_path, "fp16"), tmp_path / "whole", tmp_path / "half"
    train(plan, whole, text, "--checkpoint-every", 4)
    assert {(line["loss_scale"], line["skipped"]) for line in events(whole, "step")} == {(2.0**16, False)}
    middle = whole / "checkpoints/step-00000004"
    assert read_manifest(middle).extra["loss_scale"] == {"scale": 2.0**16, "good_steps": 4, "skipped_steps": 0}
    assert load_tensors(middle, {"head.weight"})["head.weight"].dtype == torch.float32

    (half / "checkpoints").mkdir(parents=True)
    shutil.copytree(middle, half / "checkpoints/step-00000004")
    train(plan, half, text, "--checkpoint-every", 4, "--resume")
    assert [line["loss"] for line in events(half, "step")] == [line["loss"] for line in events(whole, "step")[4:]]
    last = f"checkpoints/step-{STEPS:08d}"
    for rank in (0, 1):
        shard = f"{last}/rank-{rank:05d}.safetensors"
        assert (half / shard).read_bytes() == (whole / shard).read_bytes()
    assert read_manifest(half / last).extra["loss_scale"]["good_steps"] == STEPS

    manifest = middle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"scale": 65536.0', '"scale": 0.0'))
    shutil.rmtree(half)
    (half / "checkpoints").mkdir(parents=True)
    shutil.copytree(middle, half / "checkpoints/step-00000004")
    done = train(plan, half, text, "--resume", code=3)
    assert "field extra.loss_scale: damaged: resume from another checkpoint" in done.stderr
