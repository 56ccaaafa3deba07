"""Hashes of several files at a time."""

import hashlib
import time
from pathlib import Path
from threading import Event

import pytest

from hetermoe_cli.model.weights import hashing
from hetermoe_cli.model.weights.hashing import check_each, file_sha256


@pytest.mark.parametrize("size", [0, 5, 8, 20])
def test_a_file_of_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(hashing, "_BLOCK_BYTES", 8)
    (tmp_path / "file").write_bytes(bytes(range(size)))
    assert file_sha256(tmp_path / "file") == hashlib.sha256(bytes(range(size))).hexdigest()


def test_the_first_items_error_is_raised_and_stops_the_others() -> None:
    """Also KeyboardInterrupt: nobody waits for the rest of large files."""
    began, stopped = time.monotonic(), list[int]()

    def check(item: int, stop: Event) -> None:
        if item == 1:
            raise ValueError("1 is damaged")
        if item > 1:
            stop.wait(30)
            stopped.append(item)

    with pytest.raises(ValueError, match="1 is damaged"):
        check_each(check, range(3))
    assert stopped == [2]
    assert time.monotonic() - began < 20


def test_a_stopped_hash_reads_no_further() -> None:
    stop = Event()
    stop.set()
    assert file_sha256(Path("/dev/zero"), stop)  # has no end
