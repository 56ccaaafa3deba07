"""Byte-level text: a corpus split into training and validation, and batches that depend on nothing but the step."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hetermoe_cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Bytes = npt.NDArray[np.uint8]

VOCAB_SIZE = 256
END_OF_TEXT = 0  # the byte that ends every document; no text contains it
_END_OF_TEXT = bytes([END_OF_TEXT])
_LARGEST_SOURCE_BYTES = 256 * 1024
# Tests, parts that some distributions or later versions lack, and encodings: tables that are near copies of each other.
_SKIPPED_PACKAGES = {
    "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3",
    "msilib", "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo",
}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Training and validation bytes (uint8, read-only), no text in both; `digest` is the sha256 of the two."""

    train: Bytes
    validation: Bytes
    digest: str
    source: str


def load_corpus(sources: list[Path] | None, validation_share: float = 0.05, separator: str | None = None) -> Corpus:
    """Text of files and folders (every UTF-8 file in them, hidden ones not), or the Python standard library's.

    A file is one document, or those between its `separator`s. The same text gives the same split.

    UserError if a source is missing, unreadable, not text, or everything is empty.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share {validation_share} must lie between 0 and 1")
    if sources is None:
        name, texts = "default corpus", list(_standard_library())
    else:
        name = ", ".join(map(str, sources))
        texts = [text for source in sources for text in _read_source(source)]
    if separator:
        texts = [document for text in texts for document in text.split(separator.encode()) if document.strip()]
    train, validation = _split(texts, validation_share)
    if not train or not validation:
        raise UserError(f"{name}: no text to train on: name files or folders that hold UTF-8 text")
    digest = hashlib.sha256(b"%d:%b%b" % (len(train), train, validation)).hexdigest()
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8), digest, name)


class Batches:
    """The training order: windows of S + 1 bytes that do not overlap, in a fresh permutation every epoch.

    Sequence i of the global batch of a step is a pure function of (tokens, S, global batch, seed, step, i).
    """

    def __init__(
        self, tokens: Bytes, sequence_length: int, global_batch: int, seed: int, source: str = "corpus"
    ) -> None:
        """UserError (naming `source`) if `tokens` do not fill one window."""
        self.windows = len(tokens) // (sequence_length + 1)
        if not self.windows:
            raise UserError(
                f"{source}: {len(tokens)} bytes are too few for one sequence of {sequence_length}: "
                "add text or shorten sequence_length"
            )
        self._table = tokens[: self.windows * (sequence_length + 1)].reshape(self.windows, sequence_length + 1)
        self.sequence_length = sequence_length
        self._global_batch, self._seed = global_batch, seed
        self._permutations: dict[int, npt.NDArray[np.int64]] = {}

    def sequences(self, step: int, start: int, stop: int) -> tuple["Tensor", "Tensor"]:
        """Tokens and targets (the next byte), int64 [stop - start, S], of sequences start..stop of `step`'s batch."""
        import torch

        if not 0 <= start <= stop <= self._global_batch:
            raise ValueError(f"sequences {start}..{stop} are not in a global batch of {self._global_batch}")
        first = step * self._global_batch
        rows = [self._row(position) for position in range(first + start, first + stop)]
        chosen = torch.from_numpy(self._table[rows].astype(np.int64))
        return chosen[:, :-1], chosen[:, 1:]

    @property
    def document_tokens(self) -> int:
        """How many tokens the document of an average token has; documents are cut where sequences end.

        That is sum(n^2) / sum(n) over documents of n tokens: attention's cost per token, a + b * n, is met exactly.
        """
        ends = self._table[:, :-1] == END_OF_TEXT
        ends[:, -1] = True
        lengths = np.diff(np.flatnonzero(ends), prepend=-1)
        return max(1, round(float(np.square(lengths).sum() / lengths.sum())))

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, self.windows)
        if epoch not in self._permutations:
            # A batch may straddle two epochs, so two are kept.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self.windows)
        return int(self._permutations[epoch][index])


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
