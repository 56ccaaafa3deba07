"""Attention's backward as products of matrices: about as near to fp64 as FlashAttention's own in bf16."""

import math

import pytest
import torch
from torch import Tensor

from hetermoe_cli.model.kernels import attention_products
from hetermoe_cli.model.kernels.causal import attend

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def inputs(batch: int, heads: int, length: int, width: int, peak: float) -> list[Tensor]:
    """Query, key, value and a gradient [B, heads, S, D] in bf16; scores are `peak` times as large as usual."""
    torch.manual_seed(0)
    shape = batch, length, heads, width
    query, key, value, gradient = (torch.randn(shape).bfloat16().transpose(1, 2) for _ in range(4))
    return [query * peak, key, value, gradient]


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Of each, relative in its norm."""
    return [float((one.double() - right).norm() / right.norm()) for one, right in zip(found, exact, strict=True)]


@pytest.mark.parametrize("peak", [0.01, 1, 6, 40])
@pytest.mark.parametrize("shape", [(2, 3, 128, 16), (1, 2, 384, 32), (3, 16, 256, 24), (1, 1, 1024, 64)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_errors_are_those_of_the_kernel(shape: tuple[int, int, int, int], peak: float, scale: float | None) -> None:
    *tensors, gradient = inputs(*shape, peak=peak)
    scale = scale or 1 / math.sqrt(shape[-1])
    wide = [x.double() for x in tensors]
    exact = BACKWARD(gradient.double(), *wide, *FORWARD(*wide, 0.0, True, scale=scale), 0.0, True, scale=scale)
    kept = FORWARD(*tensors, 0.0, True, scale=scale)
    kernel = errors(BACKWARD(gradient, *tensors, *kept, 0.0, True, scale=scale), exact)
    ours = errors(attention_products.backward(gradient, *tensors, *kept, scale), exact)
    for one, other in zip(ours, kernel, strict=True):
        assert one < max(1.75 * other, 2**-7), (ours, kernel)


def test_later_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_products, "are_compiled", lambda query: True)
    *tensors, gradient = inputs(1, 2, 256, 16, peak=1)
    gradient[:, :, 100:] = 0
    tensors[1][:, :, 100:] *= 1e4  # keys whose scores would overflow an exponential
    leaves = [x.detach().requires_grad_() for x in tensors]
    to_query, to_key, to_value = torch.autograd.grad(attend(*leaves), leaves, gradient)
    for found in (to_query, to_key, to_value):
        assert found.isfinite().all()
        assert not found[:, :, 100:].any()
        assert found[:, :, :100].any()


def test_only_few_lengths_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_products, "are_compiled", lambda query: True)
    suits = [length for length in range(1, 5000) if attention_products.suits(torch.empty(1, 1, length, 8).bfloat16())]
    assert suits == list(range(128, 2049, 128))
    assert not attention_products.suits(torch.empty(1, 1, 128, 8))
