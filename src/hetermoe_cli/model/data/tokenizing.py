"""Text into token ids, by Hugging Face's tokenizers (an extra: `pip install hetermoe[text]`)."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.data.corpus import read_texts
from hetermoe_cli.model.data.token_files import Tokens
from hetermoe_cli.spec.files import write_atomic

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_AT_ONCE = 256  # documents that are encoded in parallel


@dataclass(frozen=True)
class Encoded:
    """The ids of all documents, each followed by `document_end`; `vocab_size`: what ids are below."""

    ids: Tokens
    documents: int
    document_end: int
    vocab_size: int

    def write(self, path: Path) -> None:
        """As an .npy, atomically."""
        content = io.BytesIO()
        np.save(content, self.ids, allow_pickle=False)
        write_atomic(path, content.getvalue())


def encode(
    sources: Sequence[Path], tokenizer: Path, end: str, separator: str | None, progress: Callable[[int, int], None]
) -> Encoded:
    """The ids of text in files and folders, of 16 bits where the vocabulary allows it. `progress` is called with
    (documents done, documents in all).

    UserError if there is no such tokenizer, it does not know `end`, or there is no text.
    """
    found, texts = _load(tokenizer), read_texts(sources, separator)
    document_end = found.token_to_id(end)
    if document_end is None:
        raise UserError(f"{tokenizer}: has no token {end!r}: name one of its own that ends a document as --end-token")
    if not texts:
        raise UserError(f"{', '.join(map(str, sources))}: no text: name files or folders that hold UTF-8 text")
    vocab_size = 1 + max(found.get_vocab(with_added_tokens=True).values())  # ids may leave gaps
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    parts: list[Tokens] = []
    for start in range(0, len(texts), _AT_ONCE):
        several = [text.decode() for text in texts[start : start + _AT_ONCE]]
        for one in _encoded(found, several, tokenizer):
            parts += [np.array(one.ids, dtype), np.array([document_end], dtype)]
        progress(min(start + _AT_ONCE, len(texts)), len(texts))
    return Encoded(np.concatenate(parts), len(texts), document_end, vocab_size)


def _load(path: Path) -> "Tokenizer":
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError("tokenize needs Hugging Face's tokenizers: pip install 'hetermoe[text]'") from error
    if not path.is_file():
        raise UserError(f"{path}: no such file: name a tokenizer.json")
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # the library's errors have no type of their own
        raise UserError(f"{path}: is no tokenizer.json of Hugging Face's tokenizers ({error})") from error
    found.no_truncation()  # published files ask for both, which are for batches of sentences
    found.no_padding()
    return found


def _encoded(found: "Tokenizer", texts: list[str], path: Path) -> "list[Encoding]":
    try:
        return list(found.encode_batch(texts, add_special_tokens=False))
    except Exception as error:
        raise UserError(f"{path}: cannot encode this text ({error}): take a tokenizer that knows every byte") from error
