"""`hetermoe plan` and `hetermoe train` with a fully sharded dense part, all from YAML; and how it resumes."""

import shutil
from pathlib import Path

import pytest

import train_command
from builders import make_inputs, make_model, make_profile
from command import Hetermoe
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.spec.profile import Precision
from hetermoe_cli.spec.train import DenseState
from train_command import events

MODEL = make_model(layers=2, experts=4, hidden_size=16, ffn_size=24, head_size=4)
STEPS, LENGTH, BATCH = 6, 32, 4


def plan(hetermoe: Hetermoe, folder: Path, precision: Precision, state: DenseState) -> Path:
    """What the planner makes of three equal devices."""
    profile = make_profile("cpu", model=MODEL, precision=precision, source="measured", sequence_lengths=(LENGTH,))
    inputs = make_inputs(
        (("cpu", 3),), model=MODEL, profiles={"cpu": profile}, sequence_length=LENGTH,
        global_batch_sequences=BATCH, precision=precision,
    )  # fmt: skip
    train = inputs.train.model_copy(update={"steps": STEPS, "warmup_steps": 2, "dense_state": state})
    folder.mkdir()
    for name, part in {"model": MODEL, "cluster": inputs.cluster, "train": train}.items():
        dump(part, folder / f"{name}.yaml")
    dump(profile, folder / "profiles" / "cpu.yaml")
    words = [(f"--{name}", folder / f"{name}.yaml") for name in ("model", "cluster", "train")]
    options = [*words, ("--profiles", folder / "profiles"), ("--output", folder / "plan.yaml"), ("--time-limit", 2)]
    assert hetermoe("plan", *(word for option in options for word in option)).code == 0
    return folder / "plan.yaml"


@pytest.mark.long
def test_trains_and_resumes_bit_exactly_and_under_a_plan_that_shards_nothing(
    hetermoe: Hetermoe, text: Path, tmp_path: Path
) -> None:
    """In bf16, whose masters are sharded too; tests/dist has fp64, and other plans to go on under."""
    precision: Precision = "bf16"
    full = plan(hetermoe, tmp_path / "full", precision, "full")
    layout = load(Plan, full).layout
    assert layout.gathers
    assert "gather" in hetermoe("simulate", full).out

    def train(plan_file: Path, folder: Path, *options: object) -> list[float]:
        train_command.train(plan_file, "--run-folder", folder, "--data", text, "--checkpoint-every", 3, *options)
        return [line["loss"] for line in events(folder, "step")]

    def resume(plan_file: Path, folder: Path) -> list[float]:
        shutil.copytree(tmp_path / "whole/checkpoints/step-00000003", folder / "checkpoints/step-00000003")
        return train(plan_file, folder, "--resume")

    losses = train(full, tmp_path / "whole", "--validate-every", 2)
    assert losses[-1] < losses[0]
    assert resume(full, tmp_path / "half") == losses[3:]
    plain = plan(hetermoe, tmp_path / "plain", precision, "replicated")
    assert resume(plain, tmp_path / "other") == pytest.approx(losses[3:], rel=1e-2)
