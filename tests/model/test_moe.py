"""Experts: one grouped product for all of them and a loop over them are the same function."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from builders import make_model
from hetermoe_cli.model.grouped import has_grouped_gemm
from hetermoe_cli.model.moe import ExpertGroup

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
    outputs = (group._grouped if grouped else group._one_by_one)(leaf, counts)
    found = torch.autograd.grad(outputs, [leaf, *group.parameters()], gradient)
    return [outputs.detach(), *found]


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
        alone = ExpertGroup._expert(rows[row], group.gate_up[expert], group.down[expert])
        torch.testing.assert_close(whole[row], alone)


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
