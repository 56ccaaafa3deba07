"""A corpus, text as bytes or files of token ids, split into training and validation; and batches that depend on nothing
but the step."""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.data.token_files import Tokens, digest_of, held_out, is_token_file, open_tokens
from hetermoe_cli.spec.train import TrainSpec

if TYPE_CHECKING:
    from torch import Tensor

VOCAB_SIZE = 256
END_OF_TEXT = 0  # the byte that ends every document; no text contains it
_END_OF_TEXT = bytes([END_OF_TEXT])
_LARGEST_SOURCE_BYTES = 256 * 1024
_MOST_TOKENS, _AT_ONCE = 2**26, 1024  # that are looked through for documents; windows of them at once
# Tests, parts that some distributions or later versions lack, and encodings: tables that are near copies of each other.
_SKIPPED_PACKAGES = {
    "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3",
    "msilib", "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo",
}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens, read-only, in pieces that no sequence spans: bytes (uint8) of text, which is one
    piece, and no text in both parts; or the ids of token files. `digest`: a sha256 of both parts."""

    train: Sequence[Tokens]
    validation: Sequence[Tokens]
    digest: str
    source: str
    is_text: bool


def load_corpus(sources: list[Path] | None, validation_share: float = 0.05, separator: str | None = None) -> Corpus:
    """Text of files and folders (every UTF-8 file in them, hidden ones not), or the Python standard library's; or token
    files, if all sources are (token_files.py), of each of which the end is held out.

    A text file is one document, or those between its `separator`s. The same text gives the same split.

    UserError if a source is missing, unreadable, neither text nor token ids, or everything is empty.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share {validation_share} must lie between 0 and 1")
    name = "default corpus" if sources is None else ", ".join(map(str, sources))
    if sources and any(map(is_token_file, sources)):
        return _token_corpus(sources, name, validation_share, separator)
    texts = _apart(list(_standard_library()), separator) if sources is None else read_texts(sources, separator)
    train, validation = _split(texts, validation_share)
    if not train or not validation:
        raise UserError(f"{name}: no text to train on: name files or folders that hold UTF-8 text")
    digest = hashlib.sha256(b"%d:%b%b" % (len(train), train, validation)).hexdigest()
    return Corpus([np.frombuffer(train, np.uint8)], [np.frombuffer(validation, np.uint8)], digest, name, is_text=True)


def corpus_of(sources: list[Path], train: TrainSpec, validation_share: float = 0.05) -> Corpus:
    """What a training spec trains on; without sources the default. UserError as of `load_corpus`, or if text is to end
    documents with another token than it has for that."""
    corpus = load_corpus(sources or None, validation_share, train.document_separator)
    if corpus.is_text and train.document_end != END_OF_TEXT:
        raise UserError(
            f"{corpus.source}: text is read as bytes, of which {END_OF_TEXT} ends a document: leave document_end out "
            "of the training spec, or train on token files"
        )
    return corpus


def read_texts(sources: Sequence[Path], separator: str | None = None) -> list[bytes]:
    """The documents in files and folders, as `load_corpus` takes them. UserError if one is missing or not text."""
    return _apart([text for source in sources for text in _read_source(source)], separator)


def _apart(texts: list[bytes], separator: str | None) -> list[bytes]:
    if not separator:
        return texts
    return [document for text in texts for document in text.split(separator.encode()) if document.strip()]


def _token_corpus(sources: list[Path], name: str, validation_share: float, separator: str | None) -> Corpus:
    if separator:
        raise UserError(f"{name}: document_separator is for text: name the id that ends a document as document_end")
    if other := next((source for source in sources if not is_token_file(source)), None):
        raise UserError(f"{other}: text beside token files (.npy, .bin): give either one or the other as --data")
    tokens = [open_tokens(source) for source in sources]
    return Corpus(*held_out(tokens, validation_share), digest_of(tokens, validation_share), name, is_text=False)


class Batches:
    """The training order: windows of S + 1 tokens that do not overlap, in a fresh permutation every epoch.

    Sequence i of the global batch of a step is a pure function of (tokens, S, global batch, seed, step, i).
    """

    def __init__(
        self,
        pieces: Sequence[Tokens],
        sequence_length: int,
        global_batch: int,
        seed: int,
        source: str = "corpus",
        vocab_size: int | None = None,
    ) -> None:
        """UserError (naming `source`) if `pieces` do not fill one window. `vocab_size`: larger ids are refused."""
        width = sequence_length + 1
        self._tables = [piece[: len(piece) // width * width].reshape(-1, width) for piece in pieces]
        self._ends = np.cumsum([len(table) for table in self._tables])
        self.windows = int(self._ends[-1])
        if not self.windows:
            raise UserError(
                f"{source}: {_amount(pieces)} tokens to train or to validate on are too few for one sequence of "
                f"{sequence_length}: add text or shorten sequence_length"
            )
        self.sequence_length = sequence_length
        self._source, self._vocab_size = source, vocab_size
        self._global_batch, self._seed = global_batch, seed
        self._permutations: dict[int, npt.NDArray[np.int64]] = {}

    def sequences(self, step: int, start: int, stop: int) -> tuple["Tensor", "Tensor"]:
        """Tokens and targets (the next token), int64 [stop - start, S], of sequences start..stop of `step`'s batch.

        UserError if an id is beyond the vocabulary.
        """
        import torch

        tokens = torch.from_numpy(self._chosen(step, start, stop))
        return tokens[:, :-1], tokens[:, 1:]

    def check(self, step: int) -> None:
        """UserError if an id of `step`'s batch is beyond the vocabulary."""
        self._chosen(step, 0, self._global_batch)

    def _chosen(self, step: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        if not 0 <= start <= stop <= self._global_batch:
            raise ValueError(f"sequences {start}..{stop} are not in a global batch of {self._global_batch}")
        first = step * self._global_batch
        found = self._windows([self._row(position) for position in range(first + start, first + stop)])
        self._refuse_unknown(found)
        return found

    def document_tokens(self, document_end: int = END_OF_TEXT) -> int:
        """How many tokens the document of an average token has; documents are cut where sequences end.

        That is sum(n^2) / sum(n) over documents of n tokens: attention's cost per token, a + b * n, is met exactly. Of
        long corpora windows are taken at even distances.
        """
        seen = range(0, self.windows, -(-self.windows * self.sequence_length // _MOST_TOKENS))
        parts = [seen[start : start + _AT_ONCE] for start in range(0, len(seen), _AT_ONCE)]
        ends = np.concatenate([self._windows(part)[:, :-1] == document_end for part in parts])
        ends[:, -1] = True
        lengths = np.diff(np.flatnonzero(ends), prepend=-1)
        return max(1, round(float(np.square(lengths).sum() / lengths.sum())))

    def _windows(self, numbers: Sequence[int]) -> npt.NDArray[np.int64]:
        """[n, S + 1] of these windows."""
        tables = np.searchsorted(self._ends, numbers, side="right").tolist()
        rows = [self._tables[table][number - self._ends[table]] for table, number in zip(tables, numbers, strict=True)]
        return np.array(rows, dtype=np.int64).reshape(-1, self.sequence_length + 1)

    def _refuse_unknown(self, chosen: npt.NDArray[np.int64]) -> None:
        if self._vocab_size is None or not chosen.size:
            return
        low, high = int(chosen.min()), int(chosen.max())
        if low < 0 or high >= self._vocab_size:
            raise UserError(
                f"{self._source}: holds token {high if low >= 0 else low}, the model's vocabulary has "
                f"{self._vocab_size}: raise the model's vocab_size, or make the file with the model's tokenizer"
            )

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, self.windows)
        if epoch not in self._permutations:
            # A batch may straddle two epochs, so two are kept.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self.windows)
        return int(self._permutations[epoch][index])


def _amount(pieces: Sequence[Tokens]) -> str:
    return f"{sum(map(len, pieces))}" if len(pieces) == 1 else f"pieces of at most {max(map(len, pieces), default=0)}"


def _split(texts: list[bytes], validation_share: float) -> tuple[bytes, bytes]:
    """Training and validation bytes: whole texts, in blocks where one is larger than the validation part."""
    limit = int(sum(map(len, texts)) * validation_share)
    blocks = {
        hashlib.sha256(block).digest(): block  # a text that occurs twice is kept once, so it cannot be in both parts
        for text in texts
        for block in _blocks(text, max(limit, 1))
    }
    chosen: set[bytes] = set()
    room = limit
    for key in sorted(blocks):
        if len(blocks[key]) <= room:
            chosen.add(key)
            room -= len(blocks[key])
    train = b"".join(block + _END_OF_TEXT for key, block in blocks.items() if key not in chosen)
    return train, b"".join(blocks[key] + _END_OF_TEXT for key in blocks if key in chosen)


def _blocks(text: bytes, size: int) -> Iterator[bytes]:
    return (text[start : start + size] for start in range(0, len(text), size))


def _read_source(source: Path) -> Iterator[bytes]:
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
            if path.is_file() and not hidden and _is_text(data := _read_bytes(path)):
                yield data
        return
    data = _read_bytes(source)
    if not _is_text(data):
        raise UserError(f"{source}: not UTF-8 text: convert it, or name another file")
    yield data


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check the path and its permissions") from error


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return _END_OF_TEXT not in data


def _standard_library() -> Iterator[bytes]:
    """English help texts of pydoc, then the library's Python sources."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].encode()
    root = Path(sysconfig.get_paths()["stdlib"])
    for relative in sorted(path.relative_to(root) for path in root.rglob("*.py")):
        path = root / relative
        if _SKIPPED_PACKAGES.isdisjoint(relative.parts) and path.stat().st_size < _LARGEST_SOURCE_BYTES:
            data = path.read_bytes()
            if _is_text(data):
                yield data
