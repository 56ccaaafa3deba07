"""A model whose first layer is dense, from YAML: profile, plan, train, and how a profile without it is refused."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from builders import make_inputs, make_model
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.spec.profile import Profile
from train_command import events, train
from train_command import run as hetermoe

LENGTH, STEPS = 16, 8
MODEL = make_model(
    layers=2, experts=4, hidden_size=16, ffn_size=24, head_size=4, dense_layers=1, dense_ffn_size=40,
    initializer_range=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, cluster, training spec and text; then what `hetermoe profile` measures."""
    root = tmp_path_factory.mktemp("dense")
    inputs = make_inputs((("cpu", 2),), model=MODEL, profiles={}, global_batch_sequences=4, precision="fp32")
    changes = {"sequence_length": LENGTH, "steps": STEPS, "warmup_steps": 1, "learning_rate": 0.01}
    dump(MODEL, root / "model.yaml")
    dump(inputs.cluster, root / "cluster.yaml")
    dump(inputs.train.model_copy(update=changes), root / "train.yaml")
    (root / "corpus.txt").write_text("".join(f"line {n}: the quick brown fox\n" for n in range(2000)))
    profile(root / "model.yaml", root / "profiles")
    return root


def run(*arguments: object, code: int = 0) -> str:
    """stdout and stderr of a command that must leave with `code`."""
    done = hetermoe(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def profile(model: Path, output: Path) -> None:
    sizes = ("--sequence-lengths", LENGTH, "--sequences", "1,2,4", "--tokens", "8,64")
    given = ("--device", "cpu", "--quick", "--no-network", "--model", model, "--output", output)
    run("profile", *given, *sizes)


def plan(root: Path, profiles: Path, output: Path, code: int = 0) -> str:
    files = [word for name in ("model", "cluster", "train") for word in (f"--{name}", root / f"{name}.yaml")]
    return run("plan", *files, "--profiles", profiles, "--output", output, code=code)


@pytest.mark.long
def test_it_is_profiled_planned_and_trained(folder: Path, tmp_path: Path) -> None:
    (table,) = load(Profile, folder / "profiles" / "cpu.yaml").tables
    assert len(table.dense) == len(table.attention) == 3
    assert "synthetic (1 dense + 2 layers, 4 experts" in plan(folder, folder / "profiles", tmp_path / "plan.yaml")
    assert load(Plan, tmp_path / "plan.yaml").inputs.model == MODEL
    given = ("--data", folder / "corpus.txt", "--checkpoint-every", STEPS // 2)
    train(tmp_path / "plan.yaml", "--run-folder", tmp_path / "run", *given)
    losses = [line["loss"] for line in events(tmp_path / "run", "step")]
    assert losses[-1] < 0.9 * losses[0]
    checkpoint = tmp_path / "run/checkpoints" / f"step-{STEPS // 2:08d}"
    names = {name for shard in checkpoint.glob("*.safetensors") for name in load_file(shard)}
    assert {"dense_layers.0.qkv.weight", "dense_layers.0.ffn.down.weight@exp_avg"} <= names
    shutil.copytree(checkpoint, tmp_path / "half/checkpoints" / checkpoint.name)
    train(tmp_path / "plan.yaml", "--run-folder", tmp_path / "half", *given, "--resume")
    assert [line["loss"] for line in events(tmp_path / "half", "step")] == losses[STEPS // 2 :]


@pytest.mark.long
def test_it_is_emulated(folder: Path, tmp_path: Path) -> None:
    plan(folder, folder / "profiles", tmp_path / "plan.yaml")
    given = ("--run-folder", tmp_path / "run", "--data", folder / "corpus.txt", "--emulate", "--steps", 2)
    train(tmp_path / "plan.yaml", *given)
    assert len(events(tmp_path / "run", "step")) == 2
    assert "dense_layers: 1" in (tmp_path / "run/run.yaml").read_text().split("executed:")[1]


@pytest.mark.long
def test_a_profile_of_the_model_without_it_is_refused(folder: Path, tmp_path: Path) -> None:
    dump(MODEL.model_copy(update={"dense_layers": 0, "dense_ffn_size": 0}), tmp_path / "plain.yaml")
    profile(tmp_path / "plain.yaml", tmp_path / "profiles")
    text = plan(folder, tmp_path / "profiles", tmp_path / "plan.yaml", code=3)
    assert "profile cpu: field tables: nothing for hidden 16, ffn 24, dense ffn 40" in text
    assert len(text.splitlines()) == 1
