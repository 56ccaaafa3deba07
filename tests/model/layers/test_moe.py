"""Experts: one grouped product for all of them and a loop over them are the same function."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from builders import make_model
from hetermoe_cli.model.kernels.grouped import has_grouped_gemm, run_experts
from hetermoe_cli.model.layers.moe import ExpertGroup

torch.set_num_threads(1)
WIDTH, FFN = 16, 24
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def make(experts: int, dtype: torch.dtype, ffn: int = FFN) -> ExpertGroup:
    group = ExpertGroup(make_model(hidden_size=WIDTH, ffn_size=ffn, head_size=4), 0, range(experts)).to(dtype)
    with torch.no_grad():
        for index, parameter in enumerate(group.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return group


def run(group: ExpertGroup, counts: list[int], grouped: bool, device: str = "cpu") -> list[Tensor]:
    """Outputs, and gradients of rows and weights."""
    group = group.to(device)
    generator = torch.Generator().manual_seed(7)
    rows, gradient = torch.randn(2, sum(counts), WIDTH, generator=generator).to(device, group.down.dtype)
    leaf = rows.clone().requires_grad_()
    outputs = run_experts(leaf, group.gate_up, group.down, counts, grouped)
    found = torch.autograd.grad(outputs, [leaf, *group.parameters()], gradient)
    return [outputs.detach(), *found]


def alone(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert, as it is defined."""
    gate, up = functional.linear(rows, gate_up).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, down)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_where_they_accumulate(dtype: torch.dtype, grouped: bool) -> None:
    """In place, in the weight's precision or, for bf16, in fp32."""
    group, counts = make(3, dtype), [4, 0, 7]
    once = run(group, counts, grouped)[2:]
    rows, gradient = torch.randn(2, sum(counts), WIDTH, generator=torch.Generator().manual_seed(7)).to(dtype)
    for parameter in group.parameters():
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.ones_like(parameter, dtype=torch.float32)
    places = [parameter.grad for parameter in group.parameters()]
    for _ in range(2):
        run_experts(rows.clone().requires_grad_(), group.gate_up, group.down, counts, grouped).backward(gradient)
    for parameter, place, found in zip(group.parameters(), places, once, strict=True):
        assert parameter.grad is place
        torch.testing.assert_close(place, 1 + 2 * found.float(), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("grouped", [True, False])
def test_gradients_are_those_of_autograd(grouped: bool) -> None:
    group, counts = make(2, torch.float32), [3, 5]
    found = run(group, counts, grouped)
    rows, gradient = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(7))
    leaf, (gate_up, down) = rows.requires_grad_(), group.parameters()
    outputs = torch.cat([alone(leaf[:3], gate_up[0], down[0]), alone(leaf[3:], gate_up[1], down[1])])
    expected = torch.autograd.grad(outputs, [leaf, gate_up, down], gradient)
    for one, other in zip(found, [outputs.detach(), *expected], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 3, 8])
def test_weights_scale_outputs_and_get_gradients(dtype: torch.dtype, padding: int) -> None:
    """Also of rows that lie in wider ones, as messages bring them."""
    group, counts, tolerance = make(3, dtype), [4, 0, 7], 2 * TOLERANCES[dtype]
    wide = torch.randn(11, WIDTH + padding, generator=torch.Generator().manual_seed(7)).to(dtype)
    weights, gradient = torch.rand(11).to(dtype).requires_grad_(), torch.randn(11, WIDTH).to(dtype)
    rows = wide[:, :WIDTH].detach().requires_grad_()
    outputs = run_experts(rows, group.gate_up, group.down, counts, True, weights)
    found = torch.autograd.grad(outputs, [rows, weights, *group.parameters()], gradient)
    plain = run_experts(rows, group.gate_up, group.down, counts, True) * weights[:, None]
    expected = torch.autograd.grad(plain, [rows, weights, *group.parameters()], gradient)
    for one, other in zip([outputs, *found], [plain, *expected], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
def test_one_product_equals_a_loop(dtype: torch.dtype, counts: list[int]) -> None:
    group = make(len(counts), dtype)
    for found, expected in zip(run(group, counts, True), run(group, counts, False), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_product_equals_a_loop_on_cuda() -> None:
    group, counts = make(4, torch.bfloat16).to("cuda"), [5, 0, 17, 3]
    if not has_grouped_gemm(torch.empty(0, dtype=torch.bfloat16, device="cuda"), (WIDTH, FFN)):
        pytest.skip("this card has no grouped kernel")
    for found, expected in zip(run(group, counts, True, "cuda"), run(group, counts, False, "cuda"), strict=True):
        torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("grouped", [True, False])
def test_each_row_goes_through_its_expert_alone(grouped: bool) -> None:
    group = make(3, torch.float32)
    whole = run(group, [2, 0, 3], grouped)[0]
    rows = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(7))[0]
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        torch.testing.assert_close(whole[row], alone(rows[row], group.gate_up[expert], group.down[expert]))


def test_what_the_grouped_product_takes() -> None:
    def takes(dtype: torch.dtype, *widths: int) -> bool:
        return has_grouped_gemm(torch.empty(0, dtype=dtype), widths)

    assert takes(torch.float32, 16, 24)
    assert takes(torch.bfloat16, 16, 24)
    assert not takes(torch.float64, 16, 24)
    assert not takes(torch.float32, 16, 10)
    assert not takes(torch.bfloat16, 16, 12)


@pytest.mark.parametrize(("dtype", "ffn"), [(torch.float32, 24), (torch.float32, 6), (torch.float64, 24)])
def test_every_shape_and_precision_runs(dtype: torch.dtype, ffn: int) -> None:
    group = make(2, dtype, ffn)
    rows = torch.randn(5, WIDTH, dtype=dtype, requires_grad=True)
    group(rows, [4, 1]).sum().backward()
    assert all(parameter.grad.abs().amax(dim=(1, 2)).min() > 0 for parameter in group.parameters())  # type: ignore[union-attr]
    assert group(rows[:0], [0, 0]).shape == (0, WIDTH)
