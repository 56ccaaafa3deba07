"""A small model, trained a little, split between ranks, and saved: what checkpoint tests start from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from builders import make_model
from hetermoe_cli.model.layers.moe import ExpertGroup
from hetermoe_cli.model.optimizer import make_optimizer
from hetermoe_cli.model.transformer import DenseModel, Transformer, initialise
from hetermoe_cli.model.weights.checkpoint import CheckpointState, step_folder
from hetermoe_cli.model.weights.checkpoint_saving import finish, write_shard
from hetermoe_cli.model.weights.training_state import restore_training, training_names, training_tensors
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


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])
