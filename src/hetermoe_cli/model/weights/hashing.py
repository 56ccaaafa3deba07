"""Hashes of large files, several at a time: while one is hashed or read, other threads run."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TypeVar

_THREADS = 8
_BLOCK_BYTES = 1 << 20
_T = TypeVar("_T")


def check_each(check: Callable[[_T, Event], object], items: Iterable[_T]) -> None:
    """check(item, stop) of all items in a few threads. The first item's error is raised; it sets `stop` for the others,
    and so does Ctrl-C."""
    stop = Event()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for _ in pool.map(lambda item: check(item, stop), items):
                pass
        finally:
            stop.set()


def file_sha256(path: Path, stop: Event | None = None) -> str:
    """In hexadecimal; of nobody's use once `stop` is set, which ends it early."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while not (stop and stop.is_set()) and (count := file.readinto(block)):
            digest.update(block[:count])
    return digest.hexdigest()
