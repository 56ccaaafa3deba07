"""Segments cut into equal shares, and the gradients of a fully sharded dense part."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from hetermoe_cli.runtime.modules.gradient_shares import GradientShares
from hetermoe_cli.runtime.modules.shards import Segment

SHAPES = [(3,), (5, 2), (1,), (4, 4)]  # 30 elements


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def segment(dtype: torch.dtype, count: int, own: int, kept: bool = False) -> Segment:
    return Segment.of([(parameter, None) for parameter in parameters(dtype)], {}, count, own, kept)


@pytest.mark.parametrize("count", [2, 4, 7, 40])
def test_every_element_is_in_one_share(count: int) -> None:
    shares = [segment(torch.float32, count, own) for own in range(count)]
    assert len({len(share.master) for share in shares}) == 1
    assert len(shares[0].whole) == count * len(shares[0].master)
    for place, parameter in enumerate(parameters(torch.float32)):
        pieces = [share.pieces[place] for share in shares]
        held = [(piece.start, piece.stop) for piece in pieces if piece]
        assert (held[0][0], held[-1][1]) == (0, parameter.numel())
        assert all(first[1] == second[0] for first, second in pairwise(held))
    masters = torch.cat([share.master for share in shares])
    assert torch.equal(masters, shares[0].whole)
    assert not masters[30:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_views_of_storage_that_comes_and_goes(dtype: torch.dtype) -> None:
    found, plain = segment(dtype, 4, 1), parameters(dtype)
    row = torch.ones(2, dtype=dtype, requires_grad=True)
    out = found.parameters[1] @ row  # autograd saves the weights
    kept = found.whole.clone()
    found.resize(0)
    assert found.parameters[1].untyped_storage().size() == 0
    found.resize(len(kept))
    found.whole.copy_(kept)
    out.sum().backward()
    assert row.grad is not None
    torch.testing.assert_close(row.grad, plain[1].sum(0))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.parameters, plain, strict=True))


def test_a_share_of_wide_weights_that_stay_whole_is_part_of_them() -> None:
    wide, narrow = (segment(dtype, 4, 2, kept=True) for dtype in (torch.float32, torch.bfloat16))
    for found in (wide, narrow):
        for piece in found.pieces:
            if piece:
                piece.weight.zero_()
    assert wide.master is None
    assert not torch.cat([p.flatten() for p in wide.parameters])[16:24].any()
    assert narrow.master is not None
    assert narrow.master.dtype == torch.float32
    assert not narrow.master.any()
    assert torch.cat([p.flatten() for p in narrow.parameters])[16:24].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_anywhere_in_stacks_are_cut_alike_on_holders_that_stack_them_otherwise(dtype: torch.dtype) -> None:
    """Experts 7 and 9, among others, in two orders: shares put together are the weights of both."""
    experts = torch.arange(10.0)[:, None, None].expand(10, 3, 5).to(dtype) + torch.rand(10, 3, 5).to(dtype)
    orders = [[9, 1, 7], [7, 9, 2, 3]]
    stacks = [nn.Parameter(experts[order].clone()) for order in orders]
    places = [[(stack, order.index(7)), (stack, order.index(9))] for stack, order in zip(stacks, orders, strict=True)]
    shares = [Segment.of(slices, {}, 2, own, kept=True) for own, slices in enumerate(places)]
    for share in shares:
        for piece in share.pieces:
            if piece:
                piece.weight.mul_(2)
    everyone = torch.cat([share.weights for share in shares]).to(dtype)
    for share, stack, order in zip(shares, stacks, orders, strict=True):
        share.fill(everyone)
        for place, expert in enumerate(order):
            assert torch.equal(stack[place], experts[expert] * (2 if expert in (7, 9) else 1))


def test_a_window_is_rounded_once_and_collected_away() -> None:
    found = segment(torch.bfloat16, 2, 0)
    gradients = GradientShares([found], torch.bfloat16)
    first, last = found.parameters[0], found.parameters[-1]
    (first * 1.0).sum().backward()
    for _ in range(2**9):
        (first * torch.tensor(2.0**-9, dtype=torch.bfloat16)).sum().backward()  # in bf16, 1 + 2^-9 is 1
    (last * 3.0).sum().backward()
    flat = gradients.collect(0)
    assert flat.dtype == torch.bfloat16
    assert flat.tolist() == [2.0] * 3 + [0.0] * 11 + [3.0] * 16 + [0.0] * 2
    assert all(p.grad is None for p in found.parameters)
    gradients.keep(0, flat)
    assert [piece.tolist() for piece in gradients.pieces().values()] == [[2.0] * 3, [0.0] * 10, [0.0], [3.0] * 2]
    assert gradients.add_earlier(0, flat).tolist() == [4.0] * 3 + [0.0] * 11 + [6.0] * 2 + [3.0] * 14
    gradients.zero()
    assert not gradients.shares[0].any()
