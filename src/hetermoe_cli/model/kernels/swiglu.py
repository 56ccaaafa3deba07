"""silu(gate) * up and its gradient, which keep gate and up only and stay in a CPU's cache.

Autograd's own would keep silu(gate) and the product as well, as much again as gate and up. A routed expert weights its
result with each row's combine weight, where next to nothing is to do for it (as Megatron-LM does).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hetermoe_cli.model.kernels.pieces import pieces


def swiglu(joined: Tensor) -> Tensor:
    """silu(gate) * up; joined [..., 2 F] holds gate, then up -> [..., F]."""
    return _SwiGLU.apply(joined)  # type: ignore[no-any-return, no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> Tensor:
        ctx.save_for_backward(joined)
        return activated(joined.flatten(0, -2)).view(*joined.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (joined,) = ctx.saved_tensors
        rows, given = joined.flatten(0, -2), gradients[0].flatten(0, -2)
        to_joined = torch.empty_like(rows)
        backward(rows, given, to_joined, torch.empty_like(given))
        return to_joined.view_as(joined)


def activated(joined: Tensor, weights: Tensor | None = None) -> Tensor:
    """joined [T, 2 F] -> [T, F], each row times its one of `weights` [T, 1]."""
    result = joined.new_empty(len(joined), joined.shape[1] // 2)
    more = () if weights is None else (weights,)
    for part, out, *scale in pieces(joined, result, *more):
        gate, up = part.chunk(2, dim=-1)
        torch.mul(functional.silu(gate), up, out=out)
        for weight in scale:
            out.mul_(weight)
    return result


def backward(joined: Tensor, gradient: Tensor, to_joined: Tensor, result: Tensor) -> None:
    """From joined [T, 2 F] and the gradient of the result [T, F]: that of joined into `to_joined`, the result again
    into `result`, which may be `gradient` itself."""
    for part, given, found, out in pieces(joined, gradient, to_joined, result):
        _backward(part, given, found, out)


def weighted_backward(joined: Tensor, weights: Tensor, gradient: Tensor, to_joined: Tensor, result: Tensor) -> Tensor:
    """The same of a result that was weighted; also the gradient of `weights` [T, 1]."""
    to_weights = torch.empty_like(weights)
    for part, weight, given, found, out, to_weight in pieces(joined, weights, gradient, to_joined, result, to_weights):
        scaled = given * weight
        activated = _backward(part, scaled, found, torch.empty_like(scaled))
        torch.sum(given * activated, dim=-1, keepdim=True, out=to_weight)
        torch.mul(activated, weight, out=out)
    return to_weights


def _backward(joined: Tensor, given: Tensor, to_joined: Tensor, out: Tensor) -> Tensor:
    (gate, up), (to_gate, to_up) = joined.chunk(2, dim=-1), to_joined.chunk(2, dim=-1)
    silu = functional.silu(gate)
    torch.mul(given, silu, out=to_up)
    torch.ops.aten.silu_backward.grad_input(given * up, gate, grad_input=to_gate)
    return torch.mul(silu, up, out=out)  # last: it may take the place of `given`
