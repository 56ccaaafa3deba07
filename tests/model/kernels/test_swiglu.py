"""silu(gate) * up with a gradient of its own equals autograd's."""

import pytest
import torch
from torch.nn import functional

from hetermoe_cli.model.kernels import pieces
from hetermoe_cli.model.kernels import swiglu as module
from hetermoe_cli.model.kernels.swiglu import swiglu


@pytest.mark.parametrize("block", [1, 24, 2**17])
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 8)])
def test_equals_autograd(monkeypatch: pytest.MonkeyPatch, block: int, shape: tuple[int, ...]) -> None:
    """In blocks of one row, of some and of all."""
    monkeypatch.setattr(pieces, "_ELEMENTS", block)
    joined = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, joined)
    gate, up = joined.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(joined), functional.silu(gate) * up, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("block", [1, 24, 2**17])
def test_weighted_equals_autograd(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """The result, and the gradients of gate, up and weights; the result may take the place of the gradient."""
    monkeypatch.setattr(pieces, "_ELEMENTS", block)
    joined, weights, given = (torch.randn(7, width, dtype=torch.float64) for width in (12, 1, 6))
    leaves = [joined.clone().requires_grad_(), weights.clone().requires_grad_()]
    gate, up = leaves[0].chunk(2, dim=-1)
    expected = functional.silu(gate) * up * leaves[1]
    expected.backward(given)
    torch.testing.assert_close(module.activated(joined, weights), expected)
    to_joined, result = torch.empty_like(joined), given.clone()
    to_weights = module.weighted_backward(joined, weights, result, to_joined, result)
    torch.testing.assert_close([result, to_joined, to_weights], [expected.detach(), leaves[0].grad, leaves[1].grad])


def test_keeps_gate_and_up_only() -> None:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        swiglu(torch.randn(5, 8, requires_grad=True))
    assert [tensor.shape for tensor in kept] == [(5, 8)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_equals_autograd_on_cuda() -> None:
    joined = torch.randn(7, 12, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, joined)
