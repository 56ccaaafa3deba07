"""`hetermoe train --rebalance` as a user runs it: messages, files, resuming where experts had moved to, the summary."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from builders import make_groups_plan, make_inputs, make_layout, make_model, make_plan, make_profile
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.plan import Plan
from train_command import events, train

STEPS, EVERY, SAVED = 12, 4, 9
MODEL = make_model(layers=2, experts=8, top_k=1, hidden_size=16, ffn_size=24, head_size=4, initializer_range=0.5)


def skewed_plan(hosted: tuple[int, ...] = (0, 4, 4), groups: int = 1) -> Plan:
    """By its profile experts are what an iteration takes, so slow that all real ranks are equally far from it. A second
    group has one host less."""
    profile = make_profile(
        "cpu", model=MODEL, precision="fp32", source="measured", sequence_lengths=(32,),
        attention_seconds=1.0, expert_seconds=2.0, head_seconds=0.1, optimizer_seconds_per_parameter=1e-4,
    )  # fmt: skip
    inputs = make_inputs((("cpu", 1 + 2 * groups),), model=MODEL, profiles={"cpu": profile}, sequence_length=32,
                         global_batch_sequences=2 + 2 * groups, precision="fp32")  # fmt: skip
    train = inputs.train.model_copy(update={"steps": STEPS, "warmup_steps": 2, "learning_rate": 1e-4})
    inputs = inputs.model_copy(update={"train": train})
    first, second = make_layout((2, 0, 0), hosted, micro_batches=2), make_layout((1, 0), (4, 4), micro_batches=2)
    return (
        make_plan(inputs, first) if groups == 1 else make_groups_plan(inputs, (first, [[0, 1, 2]]), (second, [[3, 4]]))
    )


def resumed_from(whole: Path, step: int, folder: Path) -> Path:
    """A new run folder that holds one checkpoint of another."""
    name = f"step-{step:08d}"
    shutil.copytree(whole / "checkpoints" / name, folder / "checkpoints" / name)
    (folder / "checkpoints/latest").write_text(name + "\n")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("groups", [1, 2])
def test_experts_move_and_a_resumed_run_goes_on_where_they_are(text: Path, tmp_path: Path, groups: int) -> None:
    dump(skewed_plan(groups=groups), tmp_path / "plan.yaml")
    common = ("--data", text, "--rebalance", "--drift-every", EVERY, "--checkpoint-every", SAVED, "--trace-steps", 0)
    whole = tmp_path / "whole"
    done = train(tmp_path / "plan.yaml", "--run-folder", whole, *common)

    changes = yaml.safe_load((whole / "rebalances.yaml").read_text())["changes"]
    moved = changes[0]["step"]
    assert moved in (EVERY, 2 * EVERY)  # later if the load was not steady at first
    assert f"step {EVERY}: since step {EVERY // 2 + 1}: departs from what was assumed: rank " in done.stderr
    assert all((f", group {group})" in done.stderr) is (groups > 1) for group in range(groups))
    assert f"step {moved}: rebalanced: {changes[0]['moved']} experts move" in done.stderr
    assert f"experts moved after step {moved}" in done.stdout
    steps = events(whole, "step")
    predicted = [line["predicted_iteration_seconds"] for line in steps]
    assert predicted[moved - 1] != predicted[moved] == changes[0]["iteration_seconds"]
    in_force = [change for change in changes if change["step"] <= SAVED][-1]
    manifest = json.loads((whole / f"checkpoints/step-{SAVED:08d}/manifest.json").read_text())
    assert manifest["extra"]["rebalanced"] == in_force

    half = resumed_from(whole, SAVED, tmp_path / "half")
    done = train(tmp_path / "plan.yaml", "--run-folder", half, *common, "--resume")
    assert "note:" not in done.stderr
    run = yaml.safe_load((half / "run.yaml").read_text())
    assert run["rebalanced"] == in_force
    assert yaml.safe_load((half / "rebalances.yaml").read_text())["changes"][0] == in_force
    losses = [line["loss"] for line in events(half, "step")]
    assert losses == [line["loss"] for line in steps[SAVED:]]  # bit by bit: the experts are where they were

    dump(skewed_plan((0, 8, 0), groups), tmp_path / "other.yaml")
    other = resumed_from(whole, SAVED, tmp_path / "other")
    done = train(tmp_path / "other.yaml", "--run-folder", other, "--data", text, "--drift-every", 0, "--resume")
    assert "note: the checkpoint's experts had moved" in done.stderr
    assert yaml.safe_load((other / "run.yaml").read_text())["rebalanced"] is None
    assert [line["loss"] for line in events(other, "step")] == pytest.approx(losses, rel=1e-4)
    assert not events(other, "drift")


def test_without_the_option_it_only_says_so(text: Path, tmp_path: Path) -> None:
    dump(skewed_plan(), tmp_path / "plan.yaml")
    folder = tmp_path / "run"
    done = train(tmp_path / "plan.yaml", "--run-folder", folder, "--data", text, "--drift-every", EVERY, "--json")
    assert len(events(folder, "drift")) == done.stderr.count("departs from what was assumed") >= 1
    assert "--rebalance moves experts where that pays" in done.stderr
    assert not events(folder, "rebalance")
    assert json.loads(done.stdout)["moves"] == []
    manifest = json.loads((folder / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())
    assert "rebalanced" not in manifest["extra"]
