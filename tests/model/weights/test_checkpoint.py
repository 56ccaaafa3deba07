"""Checkpoint files: any layout reads what any layout wrote; what is damaged or incomplete is refused by name."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_builders import MODEL, cut_short, restored, same, save, split, state, trained
from safetensors.torch import load_file, save_file
from torch import Tensor

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.weights import checkpoint
from hetermoe_cli.model.weights.checkpoint import load_tensors, read_manifest, step_folder, verify
from hetermoe_cli.model.weights.checkpoint_saving import finish, write_shard
from hetermoe_cli.model.weights.hashing import file_sha256
from hetermoe_cli.model.weights.training_state import training_names, training_tensors

EXPERT = "layers.0.experts.0.down"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_files_round_trip_between_layouts(tmp_path: Path, dtype: torch.dtype) -> None:
    model, optimizer = trained(dtype)
    tensors = training_tensors(model, optimizer)
    folder = step_folder(tmp_path, 3)
    for rank, part in enumerate(split(dtype)):
        write_shard(folder, rank, training_tensors(part, restored(part, tensors, 3)))
    finish(folder, state(3, world_size=3))
    assert same(load_tensors(folder, training_names(model)), tensors)


def test_manifest_keeps_the_run_state(tmp_path: Path) -> None:
    extra = {"loss": 1e-05, "seeds": [1, 2], "nested": {"scale": 65536.0}}
    manifest = read_manifest(save(tmp_path, 12, extra=extra))
    assert (manifest.step, manifest.data_digest, manifest.model, manifest.extra) == (12, "d", MODEL, extra)


def test_a_rank_without_tensors_writes_an_empty_shard(tmp_path: Path) -> None:
    model, optimizer = trained(torch.float32)
    folder = step_folder(tmp_path, 3)
    write_shard(folder, 0, training_tensors(model, optimizer))
    write_shard(folder, 1, {})
    finish(folder, state(world_size=2))
    assert same(load_tensors(folder, training_names(model)), training_tensors(model, optimizer))


def test_only_the_shards_that_are_needed_are_read(tmp_path: Path) -> None:
    folder = save(tmp_path)
    (folder / "rank-00001.safetensors").unlink()
    assert load_tensors(folder, {"norm.weight"}).keys() == {"norm.weight"}
    with pytest.raises(UserError, match=r"rank-00001\.safetensors: missing"):
        load_tensors(folder, {"norm.weight", EXPERT})


@pytest.mark.parametrize("read", [verify, lambda folder: load_tensors(folder, {"norm.weight", EXPERT})])
def test_shards_are_hashed_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    folder, both = save(tmp_path), threading.Barrier(2, timeout=20)

    def together(path: Path, stop: threading.Event) -> str:
        both.wait()
        return file_sha256(path, stop)

    monkeypatch.setattr(checkpoint, "file_sha256", together)
    read(folder)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_tensors(path: Path) -> None:
    forge(path, {"norm.weight": torch.ones(16)})


def change_a_dtype(path: Path) -> None:
    tensors = load_file(path)
    forge(path, {**tensors, "norm.weight": tensors["norm.weight"].double()})


def forge(path: Path, tensors: dict[str, Tensor]) -> None:
    """A valid shard that is not the one listed, and a manifest that vouches for its hash."""
    save_file(tensors, path)
    manifest_path = path.with_name("manifest.json")
    data = json.loads(manifest_path.read_text())
    entry = next(entry for entry in data["files"] if entry["file"] == path.name)
    entry |= {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
    manifest_path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip_a_byte, "corrupt"),
        (cut_short, "truncated"),
        (lose_tensors, "other tensors"),
        (change_a_dtype, "norm.weight has another shape or dtype"),
    ],
)
def test_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path], None], problem: str) -> None:
    folder = save(tmp_path)
    path = folder / "rank-00000.safetensors"
    damage(path)
    with pytest.raises(UserError, match=problem) as caught:
        load_tensors(folder, {"norm.weight"})
    assert str(path) in str(caught.value)
    assert "another checkpoint" in str(caught.value)


def edit(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(fields)


def lose_an_expert(data: dict[str, Any]) -> None:
    del data["files"][1]["tensors"]["layers.0.experts.3.down"]


def invent_an_expert(data: dict[str, Any]) -> None:
    data["files"][1]["tensors"]["layers.0.experts.4.down"] = {"shape": [16, 8], "dtype": "float32"}


def change_a_shape(data: dict[str, Any]) -> None:
    data["files"][1]["tensors"]["layers.0.experts.3.down"]["shape"] = [8, 16]


def list_twice(data: dict[str, Any]) -> None:
    data["files"][1]["tensors"]["norm.weight"] = data["files"][0]["tensors"]["norm.weight"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (edit(schema_version=2), "schema_version is 2"),
        (edit(kind="plan"), "field kind"),
        (edit(surprise=1), "field surprise: unknown field"),
        (edit(step=-1), "field step"),
        (lose_an_expert, "'layers.0.experts.3.down' missing"),
        (invent_an_expert, "'layers.0.experts.4.down' surplus"),
        (change_a_shape, "'layers.0.experts.3.down' of the wrong shape"),
        (list_twice, "'norm.weight' stored twice"),
    ],
)
def test_wrong_manifest_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], problem: str) -> None:
    folder = save(tmp_path)
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=problem) as caught:
        load_tensors(folder, {"norm.weight"})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"), [("{", "malformed JSON"), ("[]", "expected a JSON object"), (None, "no finished checkpoint")]
)
def test_unreadable_manifest_is_refused(tmp_path: Path, text: str | None, problem: str) -> None:
    path = save(tmp_path) / "manifest.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=problem) as caught:
        read_manifest(path.parent)
    assert str(path) in str(caught.value)


def test_name_that_the_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tensor 'layers.7.gate.weight' not in this checkpoint"):
        load_tensors(save(tmp_path), {"norm.weight", "layers.7.gate.weight"})
