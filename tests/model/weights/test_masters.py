"""fp32 masters of bf16 weights, checkpoints of them, and the embedding's gradient."""

import pytest
import torch
from checkpoint_builders import MODEL, TRAIN, same
from torch import Tensor, nn

from hetermoe_cli.errors import UserError
from hetermoe_cli.model import optimizer as module
from hetermoe_cli.model.layers.embedding import Embedding
from hetermoe_cli.model.optimizer import AdamW, make_optimizer
from hetermoe_cli.model.transformer import Transformer, initialise
from hetermoe_cli.model.weights.training_state import restore_training, training_tensors


def narrow(seed: int = 0) -> tuple[Transformer, AdamW]:
    """A bf16 model with masters."""
    model = Transformer(MODEL)
    initialise(model, MODEL, seed)
    masters: dict[nn.Parameter, Tensor] = {}
    for parameter in model.parameters():
        masters[parameter] = parameter.detach()
        parameter.data = parameter.data.bfloat16()
    return model, make_optimizer(model, TRAIN, masters)


def noise(model: nn.Module, step: int) -> dict[nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {p: torch.randn(p.shape, generator=generator).bfloat16() for p in model.parameters()}


@pytest.mark.parametrize("chunk", [1, 1000, 2**24])
def test_update_is_adamw_on_the_masters(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Whatever the size of the chunks; the weights are the masters, rounded."""
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    model, optimizer = narrow()
    wide = Transformer(MODEL)
    initialise(wide, MODEL, seed=0)
    expected = make_optimizer(wide, TRAIN)
    for step in range(3):
        gradients = noise(model, step)
        optimizer.update(gradients, 0.5)
        for parameter, gradient in zip(wide.parameters(), gradients.values(), strict=True):
            parameter.grad = 0.5 * gradient.float()
        expected.step()
    assert same(training_tensors(model, optimizer), training_tensors(wide, expected))
    for parameter, own in zip(model.parameters(), wide.parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, own.bfloat16())


def test_steps_below_the_weights_resolution_add_up() -> None:
    model, optimizer = narrow()
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    weight = model.dense.norm.weight
    assert weight[0] == 1
    for _ in range(100):  # each moves the master by 1e-4; bf16's next value below 1 is 1 - 2^-8
        optimizer.update({p: torch.ones_like(p) for p in model.parameters()}, 1.0)
    assert weight[0].item() == pytest.approx(0.99, abs=2**-8)


def test_masters_are_saved_and_restored_bit_for_bit() -> None:
    model, optimizer = narrow()
    for step in range(3):
        optimizer.update(noise(model, step), 1.0)
    tensors = training_tensors(model, optimizer)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    again, its_optimizer = narrow(seed=1)
    restore_training(again, its_optimizer, {name: tensor.clone() for name, tensor in tensors.items()}, 3)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    optimizer.update(noise(model, 3), 1.0)
    its_optimizer.update(noise(again, 3), 1.0)
    assert same(training_tensors(again, its_optimizer), training_tensors(model, optimizer))


def test_rounded_weights_are_no_masters() -> None:
    model, optimizer = narrow()
    tensors = {name: tensor.bfloat16() for name, tensor in training_tensors(model, optimizer).items()}
    with pytest.raises(UserError, match=r"torch.bfloat16 .* this run needs torch.float32"):
        restore_training(model, optimizer, tensors, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_embedding_adds_a_frequent_token_up_in_fp32(dtype: torch.dtype) -> None:
    table = Embedding(4, 8).to(dtype)
    table.weight.grad_dtype = torch.float32
    tokens = torch.tensor([[1] * 3000 + [2] * 5])
    rows = table(tokens)
    assert torch.equal(rows, nn.functional.embedding(tokens, table.weight))
    rows.sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad[:, 0].tolist() == [0, 3000, 5, 0]  # in place, a bf16 sum stops at 256, an fp16 one at 2048
