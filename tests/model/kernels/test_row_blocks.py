"""Products in few sizes: the ladder, what is computed, and that nothing else reaches oneDNN."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hetermoe_cli.model.kernels import grouped, row_blocks
from hetermoe_cli.model.kernels.row_blocks import Blocks, rounded

torch.set_num_threads(1)
NARROW = [torch.bfloat16, torch.float16]


class Products(TorchDispatchMode):
    """Notes the shapes of all products, and the elements of them and of converted copies."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.outputs: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("mm", "_grouped_mm"):
            self.shapes.add((*args[0].shape, *args[1].shape))
        if name in ("mm", "_grouped_mm", "_to_copy"):
            self.outputs.append(result.numel())
        return result


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor for which oneDNN compiles, wherever this runs."""
    monkeypatch.setattr(row_blocks, "are_compiled", lambda rows: rows.dtype in NARROW)


def weights(dtype: torch.dtype, experts: int = 3) -> list[nn.Parameter]:
    """gate_up and down, whose gradients accumulate as the engine has it."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in ((experts, 48, 16), (experts, 16, 24)):
        weight = nn.Parameter((0.3 * torch.randn(shape, generator=generator)).to(dtype))
        weight.grad_dtype = torch.float32
        found.append(weight)
    return found


def step(parameters: list[nn.Parameter], counts: list[int], *, grouped_mm: bool = False) -> list[torch.Tensor]:
    """Outputs, and gradients of rows and weights, of two micro-batches alike."""
    for parameter in parameters:
        parameter.grad = None
    rows, gradient = torch.randn(2, sum(counts), 16, generator=torch.Generator().manual_seed(1)).to(parameters[0].dtype)
    for _ in range(2):
        leaf = rows.clone().requires_grad_()
        outputs = grouped.run_experts(leaf, *parameters, counts, grouped=grouped_mm)
        outputs.backward(gradient)
    assert leaf.grad is not None
    return [outputs.detach(), leaf.grad, *(p.grad for p in parameters if p.grad is not None)]


@given(st.integers(1, 10**6))
def test_a_size_is_little_more_and_its_own(count: int) -> None:
    size = rounded(count)
    assert count <= size <= max(16, count + 31, count * 5 / 4)
    assert rounded(size) == size
    assert size == 16 or size % 32 == 0


def test_sizes_are_few() -> None:
    assert len({rounded(count) for count in range(1, 257)}) == 9
    assert len({rounded(count) for count in range(257, 4097)}) == 4 * 4


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("counts", [[3, 0, 40], [33, 1, 1], [16, 32, 64], [200, 5, 100]])
@pytest.mark.parametrize("grouped_mm", [False, True])
def test_blocks_change_nothing_but_rounding(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, counts: list[int], grouped_mm: bool
) -> None:
    parameters = weights(dtype)
    found = step(parameters, counts, grouped_mm=grouped_mm)
    monkeypatch.setattr(row_blocks, "are_compiled", lambda rows: False)
    for one, other in zip(found, step(parameters, counts), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("compiled")
@given(st.lists(st.integers(0, 70), min_size=1, max_size=6))
def test_zeros_follow_each_experts_rows(counts: list[int]) -> None:
    rows = torch.arange(1.0, 1 + sum(counts))[:, None].bfloat16()
    blocks = Blocks(rows, counts)
    packed = blocks.pack(rows)
    assert blocks.sizes == [rounded(count) for count in counts]
    for block, part in zip(packed.split(blocks.sizes), rows.split(counts), strict=True):
        assert torch.equal(block[: len(part)], part)
        assert block[len(part) :].count_nonzero() == 0
    assert torch.equal(blocks.unpack(packed), rows)


def test_nothing_is_copied_where_nothing_is_compiled() -> None:
    rows = torch.ones(8, 2)
    blocks = Blocks(rows, [3, 0, 5])
    assert blocks.sizes == [3, 0, 5]
    assert blocks.pack(rows) is rows
    assert blocks.unpack(rows) is rows


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", NARROW)
def test_varying_counts_meet_few_shapes(dtype: torch.dtype) -> None:
    """Forward, towards rows and towards weights; of both matrices."""
    parameters, generator = weights(dtype), torch.Generator().manual_seed(3)
    with Products() as seen:
        for _ in range(40):
            step(parameters, torch.randint(0, 200, (3,), generator=generator).tolist())
    assert 1 < len(seen.shapes) <= 6 * len({rounded(count) for count in range(1, 200)})


def test_a_hook_gets_the_gradient_of_a_narrow_weight() -> None:
    gate_up, down = weights(torch.bfloat16)
    plain = step([gate_up, down], [5, 2, 9])[3]
    down.register_hook(lambda gradient: 2 * gradient)
    torch.testing.assert_close(step([gate_up, down], [5, 2, 9])[3], 2 * plain)


@pytest.mark.parametrize("dtype", NARROW)
def test_no_layers_gradients_exist_twice(dtype: torch.dtype) -> None:
    """Beside the fp32 ones, made once, those of a single expert at a time."""
    parameters = weights(dtype, experts=8)
    with Products() as seen:
        step(parameters, [1] * 8)
    assert max(seen.outputs) <= max(p.numel() for p in parameters) // 8
