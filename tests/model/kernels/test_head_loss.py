"""The head's loss and gradients, some tokens at a time: torch's own of all at once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hetermoe_cli.model.kernels import head_loss
from hetermoe_cli.model.kernels.head_loss import summed_cross_entropy
from hetermoe_cli.spec.model import logit_tokens

TOKENS, WIDTH, VOCABULARY = 50, 12, 37


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, generator=draw).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,), generator=draw)


def few(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(head_loss, "logit_tokens", lambda vocabulary: tokens)


@pytest.mark.parametrize("tokens", [1, 7, 25, 49, 50, 1000])
def test_loss_and_gradients_are_those_of_all_logits(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, tokens)
    hidden, weight, targets = case(torch.float64)
    found = summed_cross_entropy(hidden, weight, targets, 0.5)
    (3 * found).backward()  # type: ignore[no-untyped-call]
    expected = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    gradients = torch.autograd.grad(1.5 * expected, (hidden, weight))
    torch.testing.assert_close((hidden.grad, weight.grad), gradients, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_rows_have_wide_logits_and_sums(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss in fp32; the matrix's gradient in what it accumulates in, so that parts of it are not rounded again."""
    few(monkeypatch, 7)
    hidden, weight, targets = case(dtype)
    weight.grad_dtype = torch.float32
    found = summed_cross_entropy(hidden, weight, targets)
    found.backward()  # type: ignore[no-untyped-call]
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = functional.cross_entropy(wide_hidden @ wide_weight.T, targets, reduction="sum")
    gradients = torch.autograd.grad(expected, (wide_hidden, wide_weight))
    assert found.dtype == torch.float32
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (dtype, torch.float32)
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=0)
    for one, other in zip((hidden.grad, weight.grad), gradients, strict=True):
        assert (one.double() - other).norm() < rounding * other.norm()


def test_the_scale_lifts_small_gradients_of_fp16() -> None:
    """A token that is all but certain: its gradient is below what fp16 can hold, but for a scale."""
    targets, weight = torch.zeros(1, dtype=torch.int64), torch.eye(2, dtype=torch.float16).requires_grad_()
    found = []
    for scale in (1.0, 2.0**16):
        hidden = torch.tensor([[18.0, 0.0]], dtype=torch.float16, requires_grad=True)
        summed_cross_entropy(hidden, weight, targets, scale).backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        found.append(hidden.grad[0, 1].item() / scale)
    assert found[0] == 0
    assert found[1] == pytest.approx(torch.exp(torch.tensor(-18.0)).item(), rel=1e-2)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_all_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, 25)
    hidden, weight, targets = case(torch.float32)
    with Largest() as largest:
        summed_cross_entropy(hidden, weight, targets).backward()  # type: ignore[no-untyped-call]
    assert largest.elements == 25 * VOCABULARY


def test_without_gradients_there_is_the_loss_only() -> None:
    hidden, weight, targets = case(torch.float32)
    with torch.no_grad():
        loss = summed_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    expected = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize(("vocabulary", "tokens"), [(256, 262144), (32000, 2097), (151_936, 1024)])
def test_large_vocabularies_have_logits_of_fewer_tokens_at_once(vocabulary: int, tokens: int) -> None:
    assert logit_tokens(vocabulary) == tokens
