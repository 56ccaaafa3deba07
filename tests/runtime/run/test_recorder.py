"""Files that a run writes into as it goes on."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from builders import make_plan
from hetermoe_cli.errors import UserError
from hetermoe_cli.runtime.run.recorder import Recorder, load_path
from hetermoe_cli.spec.run import RunSpec


def a_run(folder: Path, **changes: object) -> RunSpec:
    run = RunSpec(plan=make_plan(), folder=str(folder), corpus_sha256="0", precision="fp32", steps=2000)
    return run.model_copy(update=changes)


def test_the_loads_have_their_space_from_the_start(tmp_path: Path) -> None:
    Recorder(a_run(tmp_path), 0)
    found = load_path(tmp_path, 0).stat()
    assert found.st_blocks * 512 >= found.st_size > 2000 * 4
    assert not np.load(load_path(tmp_path, 0)).any()


def test_a_full_disk_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Recorder(a_run(tmp_path), 0)
    before.load(3, np.full(np.load(load_path(tmp_path, 0)).shape[1:], 7, dtype=np.int32))

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        UserError, match=r"rank0.new: cannot be written \(No space left on device\): free space, resume"
    ):
        Recorder(a_run(tmp_path, start_step=5), 0)
    assert [path.name for path in load_path(tmp_path, 0).parent.iterdir()] == ["rank0.npy"]
    assert (np.load(load_path(tmp_path, 0))[3] == 7).all()


@pytest.mark.parametrize("content", [b"", b"not numpy"])
def test_loads_that_a_crash_destroyed_do_not_keep_a_run_from_going_on(tmp_path: Path, content: bytes) -> None:
    path = load_path(tmp_path, 0)
    path.parent.mkdir()
    path.write_bytes(content)
    Recorder(a_run(tmp_path, start_step=1), 0)
    assert not np.load(path).any()


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"a": 1}'])
def test_metrics_that_are_none_are_told_with_their_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 0}\n' + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2: no event of a run: remove the line"):
        Recorder(a_run(tmp_path, start_step=1), 0)
