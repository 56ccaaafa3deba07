"""attend: gradients in narrow precisions on a CPU, whose kernel may run backward in fp32."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hetermoe_cli.model.kernels import causal
from hetermoe_cli.model.kernels.causal import attend, has_flash
from hetermoe_cli.model.kernels.documents import Documents, find_documents

BOTH_WAYS = [(48, 16), (512, 64)]  # short enough for a backward in fp32, and not


def inputs(length: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and a gradient [2, 3, S, D], as a stage cuts them out of one tensor."""
    torch.manual_seed(0)
    return [torch.randn(2, length, 3, width).to(dtype).transpose(1, 2) for _ in range(4)]


def gradients(tensors: list[Tensor], gradient: Tensor, documents: Documents | None = None) -> list[Tensor]:
    """What attend gives, and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    mixed = attend(*leaves, documents)
    return [mixed.detach(), *torch.autograd.grad(mixed, leaves, gradient)]


@pytest.mark.parametrize(("length", "width"), BOTH_WAYS)
@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_narrow_gradients_are_those_of_fp64_to_rounding(
    length: int, width: int, dtype: torch.dtype, steps: float
) -> None:
    *tensors, gradient = inputs(length, width, dtype)
    found = gradients(tensors, gradient)
    exact = gradients([x.double() for x in tensors], gradient.double())
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() < 4 * steps * other.abs().max()


def test_a_backward_in_fp32_is_nearer_than_the_kernels_own() -> None:
    *tensors, gradient = inputs(64, 32, torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in tensors]
    plain = functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=1 / math.sqrt(32))
    own = torch.autograd.grad(plain, leaves, gradient)
    mixed, *found = gradients(tensors, gradient)
    _, *exact = gradients([x.double() for x in tensors], gradient.double())
    torch.testing.assert_close(mixed, plain.detach(), rtol=0, atol=0)
    for ours, theirs, right in zip(found, own, exact, strict=True):
        assert (ours.double() - right).norm() < (theirs.double() - right).norm()


def test_narrow_gradients_inside_documents() -> None:
    tokens = torch.ones(2, 48, dtype=torch.int64)
    tokens[0, 9] = tokens[1, 30] = 0
    documents = find_documents(tokens, 0, torch.device("cpu"))
    *tensors, gradient = inputs(48, 16, torch.bfloat16)
    found = gradients(tensors, gradient, documents)
    exact = gradients([x.double() for x in tensors], gradient.double(), documents)
    for one, other in zip(found, exact, strict=True):
        assert (one.double() - other).abs().max() < 2**-6 * other.abs().max()


@pytest.mark.parametrize("packed", [False, True])
def test_groups_of_keys_read_where_they_are_count_for_all_their_heads(
    monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """torch's own grouping, which is for cards; here on a CPU, over documents by a stand-in for FlashAttention."""
    query, key, value = (torch.randn(2, heads, 12, 8, dtype=torch.float64) for heads in (6, 2, 2))
    documents = find_documents(torch.arange(24).view(2, 12) % 5, 4, query.device) if packed else None
    expected = attend(query, key, value, documents)

    def over_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
        assert (q.shape[1], k.shape[1], v.shape[1]) == (6, 2, 2)
        k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
        return causal._one_by_one(q, k, v, documents, scale)

    monkeypatch.setattr(causal, "has_flash", lambda query, value: True)
    monkeypatch.setattr(causal, "_varlen", over_documents)
    torch.testing.assert_close(attend(query, key, value, documents), expected)


@pytest.mark.parametrize(
    ("size", "capability", "found"),
    [(128, (8, 0), True), (128, (7, 0), False), (200, (8, 0), True), (200, (8, 6), False), (256, (8, 6), True)],
)
def test_flash_attention_is_taken_where_its_backward_is(
    monkeypatch: pytest.MonkeyPatch, size: int, capability: tuple[int, int], found: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = SimpleNamespace(is_cuda=True, dtype=torch.float16, device="cuda:0", shape=(1, 2, 3, size))
    assert has_flash(query, query) == found  # type: ignore[arg-type]
