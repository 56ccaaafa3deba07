"""Latent attention from YAML: profile, plan, train; export its weights and begin another run with them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builders import make_inputs, make_profile
from hetermoe_cli.model.data.corpus import END_OF_TEXT, Batches, load_corpus
from hetermoe_cli.model.transformer import Transformer, named_state, named_tensors
from hetermoe_cli.model.weights.hugging_face import Weights
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.named_models import load_model
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.spec.profile import Profile
from train_command import events, train
from train_command import run as hetermoe

MODEL_FILE = Path(__file__).resolve().parents[2] / "plans/models/latent.yaml"
MODEL = load_model(str(MODEL_FILE))
LENGTH, STEPS, BATCH = 32, 12, 4


def run(*arguments: object, code: int = 0) -> str:
    """stdout and stderr of a command that must leave with `code`."""
    done = hetermoe(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Profile, plan, a run with everything that touches attention, and its weights in Hugging Face's form."""
    root = tmp_path_factory.mktemp("latent")
    sizes = ("--sequence-lengths", LENGTH, "--sequences", "1,2,4", "--tokens", "8,64")
    run("profile", "--device", "cpu", "--quick", "--no-network", "--model", MODEL_FILE, "--output", root, *sizes)
    inputs = make_inputs((("cpu", 2),), model=MODEL, profiles={}, global_batch_sequences=BATCH, precision="fp32")
    changes = {"sequence_length": LENGTH, "steps": STEPS, "warmup_steps": 1, "learning_rate": 0.003}
    changes |= {"documents": "masked", "dense_state": "optimizer", "recompute": "all"}
    dump(inputs.cluster, root / "cluster.yaml")
    dump(inputs.train.model_copy(update=changes), root / "train.yaml")
    for number in range(8):
        (root / f"text{number}.txt").write_text("".join(f"line {n}: the quick brown fox\n" for n in range(300)))
    files = ("--model", MODEL_FILE, "--cluster", root / "cluster.yaml", "--train", root / "train.yaml")
    run("plan", *files, "--profiles", root, "--output", root / "plan.yaml", "--assignment", "ep")
    train(root / "plan.yaml", "--run-folder", root / "run", *text(root))
    run("export", root / "run", "--output", root / "exported")
    return root


def text(root: Path) -> list[object]:
    return [word for path in sorted(root.glob("text*.txt")) for word in ("--data", path)]


def test_it_is_profiled_planned_and_trained(folder: Path) -> None:
    (table,) = load(Profile, folder / "cpu.yaml").tables
    assert table.shape.latent == MODEL.latent
    assert len(table.attention) == len(table.dense) == 3
    assert load(Plan, folder / "plan.yaml").inputs.model == MODEL
    losses = [line["loss"] for line in events(folder / "run", "step")]
    assert len(losses) == STEPS
    assert losses[-1] < 0.8 * losses[0]
    (checkpoint,) = (folder / "run/checkpoints").glob("step-*")
    names = {name for shard in checkpoint.glob("*.safetensors") for name in load_file(shard)}
    assert {"layers.2.latent.key_value_up.weight", "dense_layers.0.latent.query_norm.weight@exp_avg"} <= names


@pytest.mark.long
def test_another_run_begins_with_its_weights(folder: Path, tmp_path: Path) -> None:
    """The first loss is the single-device model's under the exported weights, on the first batch."""
    train(folder / "plan.yaml", "--run-folder", tmp_path / "run", *text(folder), "--weights", folder / "exported")
    model = Transformer(MODEL, document_end=END_OF_TEXT)
    tensors = named_tensors(model) | named_state(model)
    for name, tensor in Weights(folder / "exported", MODEL).tensors(tensors).items():
        tensors[name].copy_(tensor)
    spec, corpus = load(Plan, folder / "plan.yaml").inputs.train, load_corpus(sorted(folder.glob("text*.txt")))
    batches = Batches(corpus.train, LENGTH, BATCH, spec.seed, corpus.source)
    with torch.no_grad():
        expected = model.run(*batches.sequences(0, 0, BATCH)).loss.item() / (BATCH * LENGTH)
    found = [line["loss"] for line in events(tmp_path / "run", "step")]
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[0] < 0.8 * events(folder / "run", "step")[0]["loss"]
    assert found[-1] < found[0]


def test_a_checkpoint_s_own_folder_is_exported_too(folder: Path, tmp_path: Path) -> None:
    (checkpoint,) = (folder / "run/checkpoints").glob("step-*")
    assert f"wrote step {STEPS}" in run("export", checkpoint, "--output", tmp_path / "new")
    assert (tmp_path / "new/model.safetensors").read_bytes() == (folder / "exported/model.safetensors").read_bytes()
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"]) == ("deepseek_v3", LENGTH)


def test_what_cannot_be_taken_or_written_is_one_line(folder: Path, tmp_path: Path) -> None:
    told = run("export", folder, "--output", tmp_path / "new", code=3)
    assert "neither a checkpoint nor a run folder with one" in told
    assert "name a new --output" in run("export", folder / "run", "--output", folder / "exported", code=3)
    plan = ("train", folder / "plan.yaml", *text(folder), "--run-folder")
    assert "config.json: cannot be read" in run(*plan, tmp_path / "run", "--weights", tmp_path, code=3)
    assert not (tmp_path / "run").exists()


def test_it_is_emulated(tmp_path: Path) -> None:
    """By a small model that attends plainly, as what runs takes the nominal model's time."""
    profile = make_profile("new", model=MODEL, sequence_lengths=(64,), attention_seconds=0.05, head_seconds=1e-4)
    inputs = make_inputs((("new", 2),), model=MODEL, profiles={"new": profile}, global_batch_sequences=BATCH)
    dump(inputs.cluster, tmp_path / "cluster.yaml")
    dump(inputs.train, tmp_path / "train.yaml")
    dump(profile, tmp_path / "profiles/new.yaml")
    files = ("--model", MODEL_FILE, "--cluster", tmp_path / "cluster.yaml", "--train", tmp_path / "train.yaml")
    run("plan", *files, "--profiles", tmp_path / "profiles", "--output", tmp_path / "plan.yaml", "--assignment", "ep")
    shown = run("train", tmp_path / "plan.yaml", "--run-folder", tmp_path / "run", "--emulate", "--dry-run", "--json")
    executed = json.loads(shown)["run"]["emulation"]["executed"]
    assert "latent" not in executed
    assert executed["router_score"] == "sigmoid"
