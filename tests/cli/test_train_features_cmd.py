"""`hetermoe train` with packed documents, a capacity and scaled positions, all from YAML; and how it resumes."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import train_command
from builders import make_inputs, make_layout, make_model, make_plan, make_profile
from hetermoe_cli.spec.files import dump
from train_command import events

SCALING = {"rope_type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 2}
MODEL = make_model(
    layers=2, experts=4, hidden_size=16, ffn_size=24, head_size=4, router_capacity=0.75,
    rope_scaling={**SCALING, "original_max_position_embeddings": 16},
)  # fmt: skip
STEPS, LENGTH, BATCH = 6, 32, 4


def plan_file(folder: Path, documents: str, sequences: tuple[int, int] = (1, 1), capacity: float = 0.75) -> Path:
    model = MODEL.model_copy(update={"router_capacity": capacity})
    profile = make_profile("cpu", model=model, precision="fp32", source="measured", sequence_lengths=(LENGTH,))
    inputs = make_inputs(
        (("cpu", 2),), model=model, profiles={"cpu": profile}, sequence_length=LENGTH,
        global_batch_sequences=BATCH, precision="fp32",
    )  # fmt: skip
    changes = {"steps": STEPS, "warmup_steps": 2, "documents": documents, "document_separator": "<|end|>"}
    train = inputs.train.model_copy(update=changes)
    layout = make_layout(sequences, (1, 3), micro_batches=2, recompute="none" if all(sequences) else "full")
    path = folder / f"{documents}-{sequences[0]}-{capacity}.yaml"
    dump(make_plan(inputs.model_copy(update={"train": train}), layout), path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of 3000 documents, of 3 to 40 bytes."""
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("<|end|>".join(f"{n}: {'abc ' * (n % 10)}" for n in range(3000)))
    return file


def train(plan: Path, folder: Path, text: Path, *options: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    given = ("--run-folder", folder, "--data", text, "--checkpoint-every", 3)
    return train_command.train(plan, *given, *options, code=code)


def resume(plan: Path, whole: Path, folder: Path, text: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints/step-00000003", folder / "checkpoints/step-00000003")
    return train(plan, folder, text, "--resume", code=code)


@pytest.mark.long
def test_masked_documents_and_capacity_resume_bit_exact_and_under_another_layout(text: Path, tmp_path: Path) -> None:
    """The other one sends rows again."""
    whole, moved = tmp_path / "whole", plan_file(tmp_path, "masked", (2, 0))
    masked = plan_file(tmp_path, "masked")
    train(masked, whole, text)
    resume(masked, whole, tmp_path / "half", text)
    resume(moved, whole, tmp_path / "moved", text)
    found = events(whole, "step")
    assert [line["loss"] for line in events(tmp_path / "half", "step")] == [line["loss"] for line in found[3:]]
    assert events(tmp_path / "moved", "step")[0]["loss"] == pytest.approx(found[3]["loss"], rel=1e-5)
    loads = sum(np.load(whole / f"loads/rank{rank}.npy") for rank in (0, 1))  # [steps, layers, micro-batches, experts]
    for line, rows in zip(found, loads.sum(axis=(2, 3)), strict=True):
        assert line["dropped_rows"] == [BATCH * LENGTH * MODEL.top_k - kept for kept in rows]
        assert all(0.25 * BATCH * LENGTH * MODEL.top_k <= dropped for dropped in line["dropped_rows"])
    assert loads.max() <= 2 * 12  # two sequences a micro-batch, 0.75 * 32 * 2 / 4 rows each


@pytest.mark.long
def test_masked_documents_are_another_run_than_joined_ones_and_a_router_another_model(
    text: Path, tmp_path: Path
) -> None:
    masked, joined = plan_file(tmp_path, "masked"), plan_file(tmp_path, "joined")
    train(masked, tmp_path / "masked", text, "--steps", 3)
    train(joined, tmp_path / "joined", text, "--steps", 1)
    assert events(tmp_path / "masked", "step")[0]["loss"] != events(tmp_path / "joined", "step")[0]["loss"]
    refused = resume(joined, tmp_path / "masked", tmp_path / "other", text, code=3)
    assert "field extra.documents: made with masked, this run has joined" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    looser = plan_file(tmp_path, "masked", capacity=1.5)
    refused = resume(looser, tmp_path / "masked", tmp_path / "looser", text, code=3)
    assert "field model.router_capacity: made with 0.75, this run has 1.5" in refused.stderr
