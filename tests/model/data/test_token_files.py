"""Token files: three forms of one corpus; what is wrong with one is told."""

import struct
from pathlib import Path

import numpy as np
import pytest

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.data import token_files
from hetermoe_cli.model.data.corpus import Batches, load_corpus

IDS = np.random.default_rng(0).integers(0, 60000, 3000)


def write_megatron(path: Path, ids: np.ndarray, code: int, dtype: str) -> Path:
    """As its IndexedDatasetBuilder does: one document of one sequence."""
    ids.astype(dtype).tofile(path)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, 1, 2)
    path.with_suffix(".idx").write_bytes(header + struct.pack("<iqqq", len(ids), 0, 0, 1))
    return path


def write(form: str, folder: Path, ids: np.ndarray = IDS) -> Path:
    path = folder / f"{form}.{'npy' if form.startswith('numpy') else 'bin'}"
    if form == "nanogpt":
        ids.astype("<u2").tofile(path)
    elif form.startswith("numpy"):
        np.save(path, ids.astype(form.removeprefix("numpy-")))
    else:
        write_megatron(path, ids, *{"megatron": (8, "<u2"), "megatron-wide": (4, "<i4")}[form])
    return path


@pytest.mark.parametrize(
    "form", ["numpy-uint16", "numpy-uint32", "numpy-int64", "nanogpt", "megatron", "megatron-wide"]
)
def test_every_form_holds_the_same_ids(form: str, tmp_path: Path) -> None:
    corpus = load_corpus([write(form, tmp_path)], validation_share=0.1)
    assert np.array_equal(np.concatenate([*corpus.train, *corpus.validation]), IDS)
    assert [len(part) for part in corpus.validation] == [300]
    tokens, targets = Batches(corpus.train, 26, 100, seed=1, vocab_size=60000).sequences(0, 0, 100)
    assert (tokens[:, 1:] == targets[:, :-1]).all()
    assert sorted(tokens[:, 0].tolist()) == sorted(IDS[:2700:27].tolist())


def test_several_files_are_one_corpus_that_no_sequence_joins(tmp_path: Path) -> None:
    paths = [
        write("numpy-uint16", tmp_path, IDS[:1000]),
        write("nanogpt", tmp_path, IDS[1000:1010]),
        write("megatron", tmp_path),
    ]
    corpus = load_corpus(paths, validation_share=0.01)
    batches = Batches(corpus.train, 99, batch := 9 + 29, seed=0)
    assert batches.windows == batch
    firsts = batches.sequences(0, 0, batch)[0][:, 0].tolist()
    assert sorted(firsts) == sorted([*IDS[:900:100], *IDS[:2900:100]])


def test_the_digest_sees_sizes_types_and_ids(tmp_path: Path) -> None:
    other = IDS.copy()
    other[1234] += 1
    cases = [("numpy-uint16", IDS), ("numpy-int64", IDS), ("numpy-uint16", IDS[:-1]), ("numpy-uint16", other)]
    digests = [load_corpus([write(form, tmp_path, ids)]).digest for form, ids in cases]
    assert len(set(digests)) == 4
    assert load_corpus([write("numpy-uint16", tmp_path)]).digest == digests[0]


def test_of_a_large_corpus_little_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_MOST_VALIDATION", 60)
    corpus = load_corpus([write("numpy-uint16", tmp_path), write("nanogpt", tmp_path)])
    assert [len(part) for part in corpus.validation] == [30, 30]


def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    corpus = load_corpus([write("numpy-uint16", tmp_path)])
    with pytest.raises(UserError, match=r"numpy-uint16\.npy: holds token \d+, the model's vocabulary has 256"):
        Batches(corpus.train, 32, 4, 0, corpus.source, 256).check(0)
    corpus = load_corpus([write("numpy-int64", tmp_path, np.full(500, -1))])
    with pytest.raises(UserError, match="holds token -1"):
        Batches(corpus.train, 32, 4, 0, corpus.source, 256).sequences(0, 0, 1)


def test_files_too_short_for_a_sequence_are_told(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.npy" for number in range(3)]
    for path in paths:
        np.save(path, IDS[:20])
    corpus = load_corpus(paths)
    with pytest.raises(UserError, match="pieces of at most 19 tokens to train or to validate on are too few"):
        Batches(corpus.train, 32, 4, 0, corpus.source)


def test_documents_of_token_files_are_measured(tmp_path: Path) -> None:
    ids = np.tile([*range(100, 109), 7], 300)
    batches = Batches(load_corpus([write("numpy-uint16", tmp_path, ids)]).train, 39, 4, 0)
    assert (batches.document_tokens(7), batches.document_tokens()) == (10, 39)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.npy", b"not an array", "is no array that numpy saved"),
        ("a.npy", None, "cannot be read"),
        ("a.npy", b"", "is no array that numpy saved"),
        ("a.npy", b"PK\x03\x04", "is no array that numpy saved"),
        ("a.npy", b"\x93NUMPY\x01\x00\x08\x00{'a': (\n", "is no array that numpy saved"),
        ("a.bin", b"123", "3 bytes are not 1 ids in uint16"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem) as caught:
        load_corpus([tmp_path / name])
    assert str(tmp_path / name) in str(caught.value)


def test_what_is_no_row_of_ids_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(UserError, match=r"holds float32 of shape \[3, 4\]: token ids are one row of integers"):
        load_corpus([tmp_path / "a.npy"])
    np.save(tmp_path / "b.npy", np.zeros(9, "m8[s]"))
    with pytest.raises(UserError, match=r"holds timedelta64"):
        load_corpus([tmp_path / "b.npy"])
    path = write("megatron", tmp_path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(UserError, match=r"megatron\.bin: 4000 bytes are not 3000 ids in uint16: copy the file again"):
        load_corpus([path])
    path.with_suffix(".idx").write_bytes(b"TNTIDX\x00\x00" + bytes(40))
    with pytest.raises(UserError, match=r"megatron\.idx: is no index of token ids"):
        load_corpus([path])
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(UserError, match=r"text\.txt: text beside token files"):
        load_corpus([write("nanogpt", tmp_path), tmp_path / "text.txt"])
    with pytest.raises(UserError, match="document_separator is for text"):
        load_corpus([write("nanogpt", tmp_path)], separator="<|end|>")
