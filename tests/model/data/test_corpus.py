"""Corpus: a stable split without leakage. Batches: a pure function of the step."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.data.bigram import bigram_loss, fit_bigram
from hetermoe_cli.model.data.corpus import END_OF_TEXT, Batches, Corpus, load_corpus
from hetermoe_cli.model.kernels.documents import find_documents


def documents(count: int, size: int = 200) -> list[str]:
    return [f"document {index}: " + chr(ord("a") + index % 26) * size for index in range(count)]


def write_folder(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for index, text in enumerate(texts):
        (folder / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def texts_of(part: Sequence[np.ndarray]) -> list[str]:
    return part[0].tobytes().decode().split("\0")[:-1]


@pytest.fixture(scope="module")
def default_corpus() -> Corpus:
    return load_corpus(None)


def test_split_keeps_documents_whole_and_apart(tmp_path: Path) -> None:
    texts = documents(100)
    corpus = load_corpus([write_folder(tmp_path / "text", texts)])
    train, validation = texts_of(corpus.train), texts_of(corpus.validation)
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if text in train]  # in the order of the file names
    assert 3 <= len(validation) <= 5


def test_a_document_that_occurs_twice_is_in_one_part_only(tmp_path: Path) -> None:
    texts = documents(60)
    corpus = load_corpus([write_folder(tmp_path / "a", texts), write_folder(tmp_path / "b", texts)])
    train, validation = texts_of(corpus.train), texts_of(corpus.validation)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(texts)


def test_one_long_file_is_split_into_blocks(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {number}\n" for number in range(5000)))
    corpus = load_corpus([path], validation_share=0.1)
    validation = corpus.validation[0].tobytes().rstrip(b"\0")
    assert len(validation) == path.stat().st_size // 10
    assert validation in path.read_bytes()
    assert validation not in corpus.train[0].tobytes()


def test_a_separator_stands_between_documents_of_one_file(tmp_path: Path) -> None:
    texts, path = documents(100), tmp_path / "all.txt"
    path.write_text("<|end|>" + "<|end|>".join(texts) + "<|end|>\n")
    corpus = load_corpus([path], separator="<|end|>")
    assert sorted(texts_of(corpus.train) + texts_of(corpus.validation)) == sorted(texts)
    apart = load_corpus([write_folder(tmp_path / "apart", texts)])
    assert corpus.digest == apart.digest


def test_the_end_of_a_document_is_a_byte_that_no_text_holds(tmp_path: Path) -> None:
    corpus = load_corpus([write_folder(tmp_path / "text", documents(40))])
    for part in (corpus.train, corpus.validation):
        assert (part[0] == END_OF_TEXT).sum() == len(texts_of(part))


def test_split_does_not_depend_on_where_the_text_lies(tmp_path: Path) -> None:
    one = load_corpus([write_folder(tmp_path / "one", documents(50))])
    other = load_corpus([write_folder(tmp_path / "other", documents(50))])
    assert one.digest == other.digest
    assert np.array_equal(one.validation[0], other.validation[0])


def test_digest_changes_with_one_byte(tmp_path: Path) -> None:
    texts = documents(50)
    before = load_corpus([write_folder(tmp_path / "before", texts)]).digest
    texts[7] = texts[7][:-1] + "!"
    assert load_corpus([write_folder(tmp_path / "after", texts)]).digest != before


def test_folder_skips_what_is_not_text_and_hidden_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "text", documents(30))
    (folder / "picture.bin").write_bytes(b"\xff\xfe\x00\x80")
    (folder / "zeros.bin").write_bytes(b"\0" * 100)
    (folder / ".git").mkdir()
    (folder / ".git" / "secret").write_text("hidden")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "more.txt").write_text("found in a subfolder")
    corpus = load_corpus([folder])
    assert sorted(texts_of(corpus.train) + texts_of(corpus.validation)) == sorted(
        [*documents(30), "found in a subfolder"]
    )


def test_default_corpus_is_stable_and_large(default_corpus: Corpus) -> None:
    assert load_corpus(None).digest == default_corpus.digest
    assert len(default_corpus.train[0]) > 3_000_000
    assert 0.03 < len(default_corpus.validation[0]) / len(default_corpus.train[0]) < 0.06
    documents = set(texts_of(default_corpus.train))
    assert not documents & set(texts_of(default_corpus.validation))


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read"), (b"\xff\xfe\xfa", "not UTF-8 text"), (b"", "no text to train on")],
)
def test_bad_source_is_named(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "source.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=problem) as caught:
        load_corpus([path])
    assert str(path) in str(caught.value)


def test_corpus_too_short_for_a_sequence_is_named() -> None:
    with pytest.raises(
        UserError, match=r"book\.txt: 64 tokens to train or to validate on are too few for one sequence of 64"
    ):
        Batches([np.zeros(64, np.uint8)], 64, 4, seed=0, source="book.txt")
    assert Batches([np.zeros(65, np.uint8)], 64, 4, seed=0).windows == 1


def tokens(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, length).astype(np.uint8)


def test_targets_are_the_next_bytes() -> None:
    # bytes count up, so a target is its token plus one, and the token tells the window
    data = (np.arange(250) % 256).astype(np.uint8)
    batch, targets = Batches([data], 9, 25, seed=0).sequences(0, 0, 25)
    assert batch.dtype == targets.dtype == torch.int64
    assert batch.shape == (25, 9)
    assert torch.equal(targets, batch + 1)
    assert sorted(batch[:, 0].tolist()) == list(range(0, 250, 10))


@given(windows=st.integers(1, 20), batch=st.integers(1, 25), step=st.integers(0, 10), cuts=st.lists(st.integers(0, 25)))
def test_a_batch_does_not_depend_on_how_it_is_cut(windows: int, batch: int, step: int, cuts: list[int]) -> None:
    data = tokens(windows * 5)
    whole, targets = Batches([data], 4, batch, seed=3).sequences(step, 0, batch)
    borders = [0, *sorted(min(cut, batch) for cut in cuts), batch]
    one_reader = Batches([data], 4, batch, seed=3)
    one_reader.sequences(step + 1, 0, batch)  # what was read before must not matter
    parts = [one_reader.sequences(step, a, b) for a, b in pairwise(borders)]
    assert torch.equal(torch.cat([part[0] for part in parts]), whole)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)


@given(windows=st.integers(1, 30), batch=st.integers(1, 12))
def test_every_epoch_shows_every_window_once(windows: int, batch: int) -> None:
    batches = Batches([np.arange(windows * 2).astype(np.uint8)], 1, batch, seed=5)
    steps = -(-3 * windows // batch)
    order = [int(row) for step in range(steps) for row in batches.sequences(step, 0, batch)[0][:, 0]]
    for epoch in range(3):
        assert sorted(order[epoch * windows : (epoch + 1) * windows]) == list(range(0, 2 * windows, 2))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return Batches([tokens(500)], 4, 100, seed).sequences(epoch, 0, 100)[0].tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_sequences_outside_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="not in a global batch of 4"):
        Batches([tokens(500)], 4, 4, seed=0).sequences(0, 2, 5)


def test_bigram_by_hand() -> None:
    data = np.frombuffer(b"abababac", np.uint8)  # after a: b 3 times, c once
    table = fit_bigram(data)
    a, b, c = b"abc"
    assert np.exp(table[a, b]) == pytest.approx(4 / 260)
    assert np.exp(table[a, c]) == pytest.approx(2 / 260)
    assert np.exp(table).sum(axis=1) == pytest.approx(np.ones(256))
    expected = -(np.log(4 / 260) + np.log(1 / 256)) / 2  # nothing follows c, so all bytes are equally likely
    assert bigram_loss(table, np.array([a, c]), np.array([b, a])) == pytest.approx(expected)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30))
def test_the_average_token_s_document_is_counted_as_masks_cut_it(sizes: list[int]) -> None:
    tokens = np.frombuffer(b"".join(b"x" * size + b"\0" for size in sizes) + b"x" * 9, np.uint8)
    batches = Batches([tokens], 8, batch := len(tokens) // 9, seed=0)
    lengths = find_documents(batches.sequences(0, 0, batch)[0], END_OF_TEXT, torch.device("cpu")).lengths
    mean = sum(length**2 for length in lengths) / sum(lengths)
    assert batches.document_tokens() == max(1, round(mean))
