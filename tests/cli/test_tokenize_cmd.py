"""From text to token ids to a trained model, by the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from builders import make_inputs, make_layout, make_model, make_plan, make_profile
from command import Hetermoe
from hetermoe_cli.model.data.corpus import Batches, load_corpus
from hetermoe_cli.model.transformer import Transformer, initialise
from hetermoe_cli.spec.files import dump
from train_command import events, train

tokenizers = pytest.importorskip("tokenizers")

VOCABULARY, END, LENGTH, BATCH = 320, "<end>", 32, 4
MODEL = make_model(layers=2, experts=4, hidden_size=16, ffn_size=24, head_size=4, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(20):
        words = [f"line {n}: {'abc' * (n % 7)} quick brown fox {number}" for n in range(100)]
        (folder / f"{number:02}.txt").write_text("\n".join(words))
    return folder


@pytest.fixture(scope="module")
def tokenizer(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    found = Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    found.train([str(path) for path in sorted(texts.glob("*.txt"))], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    found.save(str(path))
    return path


def test_text_becomes_ids_that_are_trained_on(hetermoe: Hetermoe, texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    output = tmp_path / "ids.npy"
    told = json.loads(
        hetermoe("tokenize", texts, "--tokenizer", tokenizer, "--end-token", END, "--output", output, "--json").out
    )
    ids = np.load(output)
    assert (told["tokens"], told["documents"], told["vocab_size"], told["document_end"]) == (
        len(ids),
        20,
        VOCABULARY,
        0,
    )
    assert ids.dtype == np.uint16
    read = tokenizers.Tokenizer.from_file(str(tokenizer)).decode(ids.tolist(), skip_special_tokens=False)
    assert read.split(END)[:-1] == [path.read_text() for path in sorted(texts.glob("*.txt"))]

    profile = make_profile("cpu", model=MODEL, precision="fp32", source="measured", sequence_lengths=(LENGTH,))
    inputs = make_inputs(
        (("cpu", 2),), model=MODEL, profiles={"cpu": profile}, sequence_length=LENGTH, global_batch_sequences=BATCH,
        precision="fp32",
    )  # fmt: skip
    spec = inputs.train.model_copy(update={"steps": 3, "warmup_steps": 1, "documents": "masked", "document_end": 7})
    plan = make_plan(inputs.model_copy(update={"train": spec}), make_layout((2, 0), (1, 3), micro_batches=2))
    dump(plan, tmp_path / "plan.yaml")
    train(tmp_path / "plan.yaml", "--run-folder", tmp_path / "run", "--data", output)
    assert events(tmp_path / "run", "step")[0]["loss"] == pytest.approx(first_loss(output, spec.seed, 7), rel=1e-5)
    hetermoe("export", tmp_path / "run", "--output", tmp_path / "exported")
    assert json.loads((tmp_path / "exported/config.json").read_text())["eos_token_id"] == 7
    np.save(tmp_path / "other.npy", ids + 100)
    refused = train(
        tmp_path / "plan.yaml", "--run-folder", tmp_path / "no", "--data", tmp_path / "other.npy", code=3
    ).stderr
    assert "other.npy: holds token 4" in refused
    assert refused.count("\n") == 1


def first_loss(path: Path, seed: int, document_end: int) -> float:
    """Of the single-device model, whose documents end with this token."""
    model = Transformer(MODEL, document_end=document_end)
    initialise(model, MODEL, seed=seed)
    tokens, targets = Batches(load_corpus([path]).train, LENGTH, BATCH, seed).sequences(0, 0, BATCH)
    with torch.no_grad():
        return model.run(tokens, targets).loss.item() / targets.numel()


def test_what_a_tokenizer_says_of_batches_does_not_cut_or_fill_documents(
    hetermoe: Hetermoe, texts: Path, tokenizer: Path, tmp_path: Path
) -> None:
    found = tokenizers.Tokenizer.from_file(str(tokenizer))
    found.enable_truncation(16)
    found.enable_padding(length=9)
    found.save(str(tmp_path / "batches.json"))
    for name, path in (("plain", tokenizer), ("batches", tmp_path / "batches.json")):
        arguments = ("--tokenizer", path, "--end-token", END, "--output", tmp_path / f"{name}.npy")
        assert hetermoe("tokenize", texts, *arguments).code == 0
    assert (tmp_path / "plain.npy").read_bytes() == (tmp_path / "batches.npy").read_bytes()


def test_ids_may_leave_gaps_and_text_may_be_unknown(hetermoe: Hetermoe, texts: Path, tmp_path: Path) -> None:
    words = {END: 0, "fox": 70000}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words)).save(str(tmp_path / "words.json"))
    (tmp_path / "fox.txt").write_text("fox")
    arguments = ("--tokenizer", tmp_path / "words.json", "--end-token", END, "--output", tmp_path / "ids.npy")
    assert json.loads(hetermoe("tokenize", tmp_path / "fox.txt", *arguments, "--json").out)["vocab_size"] == 70001
    assert np.load(tmp_path / "ids.npy").tolist() == [70000, 0]
    refused = hetermoe("tokenize", texts, *arguments)
    assert (refused.code, refused.err.count("\n")) == (3, 1)
    assert "cannot encode this text" in refused.err


def test_what_cannot_be_tokenized_is_told(hetermoe: Hetermoe, texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    def told(source: Path, path: Path, end: str = END) -> str:
        arguments = ("tokenize", source, "--tokenizer", path, "--end-token", end, "--output", tmp_path / "ids.npy")
        done = hetermoe(*arguments)
        assert done.code == 3
        return done.err

    assert "has no token '<eos>'" in told(texts, tokenizer, "<eos>")
    assert "is no tokenizer.json" in told(texts, texts / "00.txt")
    assert "no such file: name a tokenizer.json" in told(texts, tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    assert "no text: name files" in told(tmp_path / "empty", tokenizer)
    assert not (tmp_path / "ids.npy").exists()
