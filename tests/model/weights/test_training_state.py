"""Weights and AdamW state: any split of the experts restores any other bit for bit, and refuses the wrong tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoint_builders import MODEL, TRAIN, restored, same, split, train_step, trained
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hetermoe_cli.errors import UserError
from hetermoe_cli.model.optimizer import make_optimizer
from hetermoe_cli.model.transformer import Transformer, named_tensors
from hetermoe_cli.model.weights.training_state import (
    begin_with,
    expected_shapes,
    restore_training,
    training_shapes,
    training_tensors,
)


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


def test_training_begins_with_weights_as_if_they_had_been_drawn() -> None:
    """In whatever precision they come, here float64 of an fp32 run's."""
    model, _ = trained(torch.float32)
    weights = {name: tensor.double() for name, tensor in named_tensors(model).items()}
    optimizer, again = make_optimizer(model, TRAIN), Transformer(MODEL)
    its_optimizer = make_optimizer(again, TRAIN)
    begin_with(again, its_optimizer, weights)
    for _ in range(3):
        train_step(model, optimizer)
        train_step(again, its_optimizer)
    assert same(training_tensors(again, its_optimizer), training_tensors(model, optimizer))


def test_state_before_the_first_step_is_zero() -> None:
    model = Transformer(MODEL)
    tensors = training_tensors(model, make_optimizer(model, TRAIN))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == training_shapes(MODEL)
    assert not any(tensor.any() for name, tensor in tensors.items() if "@" in name)


def test_state_is_made_only_where_it_is_missing() -> None:
    """And then of the slice alone, not of all experts once for each."""

    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "zeros_like":
                made.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    for steps in (0, 1):
        model, optimizer = trained(torch.float32, steps)
        made: list[int] = []
        with Zeros():
            training_tensors(model, optimizer)
        assert sum(made) == (2 * MODEL.parameters if steps == 0 else 0)


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
