"""Files of token ids: numpy's .npy, and .bin as Megatron-LM (with its .idx) or nanoGPT (uint16) write them.

Files are mapped, never read as a whole, so that they may be larger than memory.
"""

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np
import numpy.typing as npt

from hetermoe_cli.errors import UserError

Tokens = npt.NDArray[np.integer]

SUFFIXES = {".npy", ".bin"}
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
# Of an .idx: magic, version, code of the type, sequences, documents; then the sequences' lengths (int32).
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # numpy's names of its integers
_MOST_VALIDATION = 2**26  # tokens that are held out at most: whole corpora may have 10^12
_SAMPLES, _SAMPLE = 1024, 1024  # blocks of a file that its digest reads, tokens in each


def is_token_file(path: Path) -> bool:
    """By its name: .npy, or .bin where it is no folder."""
    return path.suffix in SUFFIXES and not path.is_dir()


def open_tokens(path: Path) -> Tokens:
    """The ids in a file, mapped, [n]. UserError if it is missing, damaged, or holds something else."""
    try:
        found: Tokens = _numpy(path) if path.suffix == ".npy" else _raw(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be read ({reason}): check the path and its permissions") from error
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise UserError(f"{path}: holds {found.dtype} of shape {list(found.shape)}: token ids are one row of integers")
    return found


def _numpy(path: Path) -> Tokens:
    try:
        found: Tokens = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, TypeError, EOFError, OverflowError, SyntaxError, TokenError) as error:
        raise UserError(f"{path}: is no array that numpy saved ({error}): write it with numpy.save") from error
    return found


def _raw(path: Path) -> Tokens:
    index, size = path.with_suffix(".idx"), path.stat().st_size
    dtype, count = _indexed(index) if index.exists() else (np.dtype("<u2"), size // 2)
    if size != count * dtype.itemsize:
        raise UserError(f"{path}: {size} bytes are not {count} ids in {dtype.name}: copy the file again")
    return np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)


def _indexed(path: Path) -> "tuple[np.dtype[np.integer], int]":
    """Type and number of the ids that an .idx stands for."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        magic, version, code, sequences, _ = (
            _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0, 0, 0)
        )
        lengths = np.frombuffer(file.read(4 * min(sequences, path.stat().st_size)), "<i4")
    if magic != _MAGIC or version != _VERSION or code not in _TYPES or len(lengths) != sequences:
        raise UserError(f"{path}: is no index of token ids as Megatron-LM writes them: make it again, or remove it")
    return np.dtype(_TYPES[code]), int(lengths.sum(dtype=np.int64))


def held_out(tokens: Sequence[Tokens], share: float) -> tuple[list[Tokens], list[Tokens]]:
    """Training and validation part of every file: its end is held out, together at most 2^26 tokens."""
    share = min(share, _MOST_VALIDATION / max(1, sum(map(len, tokens))))
    cuts = [len(one) - int(len(one) * share) for one in tokens]
    return [t[:cut] for t, cut in zip(tokens, cuts, strict=True)], [
        t[cut:] for t, cut in zip(tokens, cuts, strict=True)
    ]


def digest_of(tokens: Sequence[Tokens], share: float) -> str:
    """sha256 of sizes, types and 1,024 blocks of every file, evenly spread: whole files would take minutes to read."""
    result = hashlib.sha256(repr(share).encode())
    for one in tokens:
        result.update(f"{one.dtype.name} {len(one)}".encode())
        for start in np.linspace(0, max(0, len(one) - _SAMPLE), _SAMPLES).astype(np.int64).tolist():
            result.update(np.ascontiguousarray(one[start : start + _SAMPLE]).tobytes())
    return result.hexdigest()
