"""RMSNorm with a backward of its own equals torch's."""

import pytest
import torch
from torch import nn

from hetermoe_cli.model.layers.norm import RMSNorm


def test_gradients_are_right() -> None:
    norm = RMSNorm(6, eps=1e-5).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, x), (x, weight)
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
def test_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = RMSNorm(48, eps=1e-5).to(dtype), nn.RMSNorm(48, eps=1e-5).to(dtype)
    weight, x = torch.randn(48, dtype=dtype), 3 * torch.randn(4, 5, 48, dtype=dtype)
    found = []
    for norm in (ours, theirs):
        with torch.no_grad():
            norm.weight.copy_(weight)
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y))
        found.append([y.detach(), leaf.grad, norm.weight.grad])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
