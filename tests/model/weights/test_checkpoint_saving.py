"""Saving a checkpoint destroys nothing, whenever it fails or is killed."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_builders import cut_short, save, state, trained
from safetensors import SafetensorError
from torch import Tensor

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.weights import checkpoint_saving
from hetermoe_cli.model.weights.checkpoint import find_latest, load_tensors, read_manifest, step_folder
from hetermoe_cli.model.weights.checkpoint_saving import finish, write_shard
from hetermoe_cli.model.weights.training_state import training_tensors


def test_latest_follows_the_saves_and_old_ones_go(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    for step in (5, 10, 15):
        folder = save(tmp_path, step, keep=2)
        assert find_latest(tmp_path) == folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000015"]


def test_the_last_written_are_kept_not_those_with_the_highest_step(tmp_path: Path) -> None:
    """Resumed from step 5, a run writes step 10 while an abandoned step 30 lies there."""
    for written, step in enumerate((30, 5)):
        os.utime(save(tmp_path, step) / "manifest.json", (written, written))
    newest = save(tmp_path, 10, keep=2)
    assert find_latest(tmp_path) == newest
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000005", "step-00000010"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, extra={"attempt": 1})
    assert read_manifest(save(tmp_path, 3, extra={"attempt": 2})).extra == {"attempt": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_left_overs_of_interrupted_saves_do_not_get_in(tmp_path: Path) -> None:
    """Four ranks died while saving step 3; two ranks save it now."""
    write_shard(step_folder(tmp_path, 3), 3, {"norm.weight": torch.ones(16)})
    write_shard(step_folder(tmp_path, 2), 0, {"norm.weight": torch.ones(16)})
    folder = save(tmp_path, 3)
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_a_missing_rank_is_named_and_nothing_changes(tmp_path: Path) -> None:
    before = save(tmp_path, 3)
    write_shard(step_folder(tmp_path, 4), 0, training_tensors(*trained(torch.float32)))
    with pytest.raises(UserError, match="rank 1 wrote no shard"):
        finish(step_folder(tmp_path, 4), state(4, world_size=2), keep=1)
    assert find_latest(tmp_path) == before
    assert read_manifest(before).step == 3


@pytest.mark.parametrize(
    ("drop", "extra", "problem"),
    [("head.weight", {}, "missing"), ("", {"head.weight": torch.ones(256, 16)}, "stored twice")],
)
def test_shards_must_hold_every_tensor_once(tmp_path: Path, drop: str, extra: dict[str, Tensor], problem: str) -> None:
    tensors = training_tensors(*trained(torch.float32))
    folder = step_folder(tmp_path, 4)
    write_shard(folder, 0, {name: tensor for name, tensor in tensors.items() if name != drop})
    write_shard(folder, 1, extra)
    with pytest.raises(UserError, match=f"'head.weight' {problem}"):
        finish(folder, state(4, world_size=2))
    assert find_latest(tmp_path) is None


def test_a_shard_that_shrank_since_it_was_written_is_refused(tmp_path: Path) -> None:
    folder = step_folder(tmp_path, 4)
    write_shard(folder, 0, training_tensors(*trained(torch.float32)))
    cut_short(folder.with_name(folder.name + ".tmp") / "rank-00000.safetensors")
    with pytest.raises(UserError, match=r"rank-00000.safetensors: not the \d+ bytes that rank 0 wrote"):
        finish(folder, state(4))


def test_an_old_sidecar_does_not_vouch_for_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save was interrupted, the next attempt at the same step fails on one rank."""
    folder, tensors = step_folder(tmp_path, 4), training_tensors(*trained(torch.float32))
    write_shard(folder, 0, tensors)

    def fail(tensors: dict[str, Tensor], path: Path) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint_saving, "save_file", fail)
    with pytest.raises(UserError, match=r"rank-00000\.safetensors: I/O error: No space left on device: free space"):
        write_shard(folder, 0, tensors)
    with pytest.raises(UserError, match="rank 0 wrote no shard"):
        finish(folder, state(4))


@pytest.mark.parametrize("again", [False, True])
def test_failing_rename_leaves_the_old_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """The disk fails at the rename, also when the same step is being replaced."""
    before = save(tmp_path, 3)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="No space left on device"):
        save(tmp_path, 3 if again else 4, keep=1)
    assert find_latest(tmp_path) == before
    assert load_tensors(before, {"norm.weight"})["norm.weight"].shape == (16,)


def test_killed_between_the_two_renames_of_a_replacement(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    old = folder.with_name(folder.name + ".old")
    folder.rename(old)
    assert find_latest(tmp_path) == old
    assert read_manifest(old).step == 3


def test_killed_before_the_first_pointer(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    (tmp_path / "latest").unlink()
    shutil.copytree(folder, tmp_path / "step-00000009.tmp")  # and a later save was killed before its rename
    assert find_latest(tmp_path) == folder


def test_latest_that_names_nothing_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "latest").write_text("step-00000099\n")
    with pytest.raises(UserError, match="names the checkpoint 'step-00000099', which is not there"):
        find_latest(tmp_path)


def test_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Not a directory|File exists"):
        write_shard(step_folder(tmp_path / "file", 1), 0, {})
