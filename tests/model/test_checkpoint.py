"""Checkpoints: any layout writes, any layout reads, bit for bit; what is damaged or incomplete is refused by name."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from builders import make_model
from hetermoe_cli.errors import UserError
from hetermoe_cli.model import checkpoint
from hetermoe_cli.model.checkpoint import (
    CheckpointState,
    find_latest,
    finish,
    load_tensors,
    read_manifest,
    step_folder,
    write_shard,
)
from hetermoe_cli.model.moe import ExpertGroup
from hetermoe_cli.model.optimizer import make_optimizer
from hetermoe_cli.model.training_state import (
    expected_shapes,
    restore_training,
    training_names,
    training_shapes,
    training_tensors,
)
from hetermoe_cli.model.transformer import DenseModel, Transformer, initialise, named_tensors
from hetermoe_cli.spec.train import TrainSpec

torch.set_num_threads(1)
MODEL = make_model(layers=2, experts=4, hidden_size=16, ffn_size=8, attention_heads=2, kv_heads=1, head_size=8)
TRAIN = TrainSpec(sequence_length=8, global_batch_sequences=2, warmup_steps=0)
TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))


class Part(nn.Module):
    """One rank: perhaps the dense model, and in every layer one or more groups of experts."""

    def __init__(self, dense: bool, groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.dense = DenseModel(MODEL) if dense else None
        self.groups = nn.ModuleList(ExpertGroup(MODEL, layer, ids) for layer in range(MODEL.layers) for ids in groups)


def split(dtype: torch.dtype) -> list[Part]:
    """Three ranks: attention with one expert, two hosts, one of them with two groups and no order."""
    return [part.to(dtype) for part in (Part(True, [[2]]), Part(False, [[3], [0]]), Part(False, [[1]]))]


def trained(dtype: torch.dtype, steps: int = 3) -> tuple[Transformer, torch.optim.AdamW]:
    model = Transformer(MODEL).to(dtype)
    initialise(model, MODEL, seed=0)
    optimizer = make_optimizer(model, TRAIN)
    for _ in range(steps):
        train_step(model, optimizer)
    return model, optimizer


def train_step(model: Transformer, optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    optimizer.step()


def restored(part: nn.Module, tensors: dict[str, Tensor], step: int) -> torch.optim.AdamW:
    optimizer = make_optimizer(part, TRAIN)
    restore_training(part, optimizer, {name: tensors[name] for name in training_names(part)}, step)
    return optimizer


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def state(step: int = 3, world_size: int = 1, **other: Any) -> CheckpointState:
    return CheckpointState(step=step, data_digest="d", model=MODEL, world_size=world_size, **other)


def save(run: Path, step: int = 3, keep: int = 2, **other: Any) -> Path:
    """A checkpoint of two ranks: the dense part on the first, experts on the second."""
    model, optimizer = trained(torch.float32, steps=1)
    tensors = training_tensors(model, optimizer)
    folder = step_folder(run, step)
    for rank, expert in enumerate((False, True)):
        write_shard(folder, rank, {name: t for name, t in tensors.items() if (".experts." in name) == expert})
    finish(folder, state(step, world_size=2, **other), keep)
    return folder


# --- weights and AdamW state ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_split_restores_bit_for_bit(dtype: torch.dtype) -> None:
    model, optimizer = trained(dtype)
    tensors = training_tensors(model, optimizer)
    gathered: dict[str, Tensor] = {}
    for part in split(dtype):
        gathered |= training_tensors(part, restored(part, tensors, step=3))
    assert same(gathered, tensors)
    again = Transformer(MODEL).to(dtype)
    assert same(training_tensors(again, restored(again, gathered, step=3)), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [0, 3])
def test_training_goes_on_as_if_never_stopped(dtype: torch.dtype, steps: int) -> None:
    model, optimizer = trained(dtype, steps)
    again = Transformer(MODEL).to(dtype)
    its_optimizer = restored(again, training_tensors(model, optimizer), steps)
    for _ in range(3):
        train_step(model, optimizer)
        train_step(again, its_optimizer)
    assert same(training_tensors(again, its_optimizer), training_tensors(model, optimizer))


def test_state_before_the_first_step_is_zero() -> None:
    model = Transformer(MODEL)
    tensors = training_tensors(model, make_optimizer(model, TRAIN))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == training_shapes(MODEL)
    assert not any(tensor.any() for name, tensor in tensors.items() if "@" in name)


def test_restored_step_counts_are_separate_tensors() -> None:
    model, optimizer = trained(torch.float32)
    again = restored(Transformer(MODEL), training_tensors(model, optimizer), 7)
    counts = [values["step"] for values in again.state.values()]
    assert [count.item() for count in counts] == [7.0] * len(list(model.parameters()))
    assert len({count.data_ptr() for count in counts}) == len(counts)


def test_expected_shapes_are_those_of_the_model() -> None:
    real = {name: tuple(tensor.shape) for name, tensor in named_tensors(Transformer(MODEL)).items()}
    assert expected_shapes(MODEL) == real
    huge = MODEL.model_copy(update={"hidden_size": 2**20, "ffn_size": 2**20})
    assert expected_shapes(huge)["layers.1.experts.3.down"] == (2**20, 2**20)  # allocates nothing


def remove(tensors: dict[str, Tensor]) -> None:
    del tensors["layers.1.experts.2.down@exp_avg"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["layers.1.experts.9.down"] = torch.zeros(1)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["head.weight"] = tensors["head.weight"].T


def widen(tensors: dict[str, Tensor]) -> None:
    tensors["head.weight"] = tensors["head.weight"].double()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "'layers.1.experts.2.down@exp_avg' is missing"),
        (add, "'layers.1.experts.9.down' has no place on this rank"),
        (reshape, r"'head.weight' is torch.float32 \[16, 256\], this run needs torch.float32 \[256, 16\]"),
        (widen, "'head.weight' is torch.float64 .* this run needs torch.float32"),
    ],
)
def test_restore_refuses_other_tensors_and_changes_nothing(
    damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = training_tensors(*trained(torch.float32))
    damage(tensors)
    fresh, optimizer = trained(torch.float32, steps=0)
    before = {name: tensor.clone() for name, tensor in training_tensors(fresh, optimizer).items()}
    with pytest.raises(UserError, match=message):
        restore_training(fresh, optimizer, tensors, 3)
    assert same(training_tensors(fresh, optimizer), before)
    assert not optimizer.state


# --- files ---


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
        load_tensors(folder, {"norm.weight", "layers.0.experts.0.down"})


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def replace_by_another(path: Path) -> None:
    """A valid shard with other tensors, and a manifest that vouches for it."""
    save_file({"norm.weight": torch.ones(3)}, path)
    manifest_path = path.with_name("manifest.json")
    data = json.loads(manifest_path.read_text())
    entry = next(entry for entry in data["files"] if entry["file"] == path.name)
    entry |= {"sha256": checkpoint._file_sha256(path), "size_bytes": path.stat().st_size}
    manifest_path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "problem"), [(flip_a_byte, "corrupt"), (cut_short, "truncated"), (replace_by_another, "other tensors")]
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


# --- saving never destroys ---


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
    write_shard(step_folder(tmp_path, 9), 0, {})
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
