"""The gate of one layer: scores in fp32 or wider, the choice of experts, the losses and the bias that balance it."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.init import kaiming_uniform_

from hetermoe_cli.spec.model import ModelConfig

Router = Literal["learned", "balanced"]
_SMALLEST_SUM = 1e-20  # sigmoid scores of all choices may underflow (DeepSeek-V3's constant)


class Choice(NamedTuple):
    """T = B * S tokens, k choices each: combine `weights` [T, k] and chosen `experts` [T, k] int64.

    A choice that its expert has no room for is weight 0 of "expert" E. `losses` [2]: auxiliary and z-loss with their
    coefficients, summed over tokens as the cross entropy is; None where the model has neither.
    """

    weights: Tensor
    experts: Tensor
    losses: Tensor | None


class Gate(nn.Module):
    """Top-k gate. With balancing by bias, `selection_bias` [E] is added to the scores for the selection only
    (arXiv 2408.15664); it is state of the training but no parameter, and stays fp32 whatever the weights are."""

    def __init__(self, config: ModelConfig, router: Router = "learned") -> None:
        super().__init__()
        self.config, self.router = config, router
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden_size))
        kaiming_uniform_(self.weight, a=5**0.5)  # nn.Linear's
        self.selection_bias: Tensor | None
        balanced = config.router_balance == "bias"
        # it has values in a module that is made on the meta device too
        bias = torch.zeros(config.experts, dtype=torch.float32, device="cpu") if balanced else None
        self.register_buffer("selection_bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        """The bias follows to another device, but not to another precision: its steps would round to nothing."""
        bias = self.selection_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if bias is not None and self.selection_bias is not None:
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    def forward(self, normed: Tensor) -> Choice:
        """normed [B, S, H] -> Choice, its weights in normed's precision."""
        logits = wide_linear(normed, self.weight)
        scores = logits.softmax(dim=-1) if self.config.router_score == "softmax" else logits.sigmoid()
        top, experts = self._choose(scores)
        weights = self._combine_weights(top.flatten(0, 1)).to(normed.dtype)
        losses = self._losses(logits, scores, experts)  # of what was asked for, dropped or not
        weights, experts = self._drop(weights, experts)
        return Choice(weights, experts.flatten(0, 1), losses)

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and indices of the chosen experts, [B, S, k]. `balanced` forces equal loads and keeps the scores."""
        batch, length, count = scores.shape
        if self.router == "balanced":
            experts = balanced_choices(length, self.config.top_k, count, scores.device).expand(batch, -1, -1)
        elif self.selection_bias is not None:
            experts = (scores + self.selection_bias).topk(self.config.top_k, dim=-1).indices
        else:
            top, experts = scores.topk(self.config.top_k, dim=-1)
            return top, experts
        return scores.gather(-1, experts), experts

    def _combine_weights(self, top: Tensor) -> Tensor:
        c = self.config
        # renormalised, a single weight would be 1 and the gate would never learn (Switch)
        if c.router_renormalise and c.top_k > 1:
            total = top.sum(dim=-1, keepdim=True)
            top = top / (total + _SMALLEST_SUM if c.router_score == "sigmoid" else total)
        return top if c.router_scale == 1.0 else top * c.router_scale

    def _drop(self, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Drop what exceeds the experts' capacity, of weights [T, k] and experts [B, S, k]."""
        c = self.config
        if c.router_capacity is None:
            return weights, experts
        rows = math.ceil(c.router_capacity * experts.shape[1] * c.top_k / c.experts)
        late = beyond(experts, c.experts, rows)
        return weights.masked_fill(late.flatten(0, 1), 0.0), experts.masked_fill(late, c.experts)

    def _losses(self, logits: Tensor, scores: Tensor, experts: Tensor) -> Tensor | None:
        auxiliary, z = self.config.router_auxiliary_loss, self.config.router_z_loss
        if not (auxiliary or z):
            return None
        zero = logits.new_zeros(())
        if self.config.router_score == "sigmoid":
            scores = scores / (scores.sum(dim=-1, keepdim=True) + _SMALLEST_SUM)
        return torch.stack(
            [
                auxiliary * balance_loss(scores, experts) if auxiliary else zero,
                z * logits.logsumexp(dim=-1).square().sum() if z else zero,
            ]
        )

    def update_bias(self, rows: Tensor) -> None:
        """After an optimizer step in which the experts got `rows` [E] float64: up where below the mean, down above."""
        if self.selection_bias is not None:
            step = torch.sign(rows.mean() - rows).to(self.selection_bias)
            self.selection_bias.add_(step, alpha=self.config.router_bias_rate)


@cache
def balanced_choices(length: int, top_k: int, count: int, device: torch.device) -> Tensor:
    """[S, k] choices of equal loads: of E in a row each expert is one, in an order of their own, so that those of a
    token are no more often on one device than if they were drawn."""
    slots, once = length * top_k, math.lcm(count, top_k)
    rounds = -(-slots // once)
    orders = torch.rand(rounds, count, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    return orders.repeat(1, once // count).flatten()[:slots].view(length, top_k).to(device)


def balance_loss(probabilities: Tensor, experts: Tensor) -> Tensor:
    """Sum over sequences of length x sum over experts of f P (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

    probabilities [B, S, E] sum to 1, experts [B, S, k] are the choices. f: an expert's rows over the mean of all; P:
    its mean probability. Each sequence counts by itself, so that nothing depends on how a batch is cut.
    """
    chosen, count = experts.flatten(1), probabilities.shape[-1]
    once = torch.ones_like(chosen, dtype=probabilities.dtype)
    rows = probabilities.new_zeros(len(chosen), count).scatter_add_(1, chosen, once)
    return (rows * (count / chosen.shape[1]) * probabilities.sum(dim=1)).sum()


def beyond(experts: Tensor, count: int, capacity: int) -> Tensor:
    """Which choices [B, S, k] of `count` experts come after the first `capacity` of their expert in their sequence.

    In token order, so that no token depends on later ones; each sequence by itself, as in `balance_loss`.
    """
    chosen = experts.flatten(1)
    order = chosen.argsort(dim=1, stable=True)
    rows = chosen.new_zeros(len(chosen), count).scatter_add_(1, chosen, torch.ones_like(chosen))
    first = (rows.cumsum(dim=1) - rows).gather(1, chosen.gather(1, order))  # place of each expert's first choice
    place = torch.arange(chosen.shape[1], device=chosen.device) - first
    return torch.zeros_like(chosen, dtype=torch.bool).scatter_(1, order, place >= capacity).view_as(experts)


def wide_linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [..., H] x weight [E, H] -> [..., E], in fp32 where they are narrower."""
    if torch.promote_types(rows.dtype, torch.float32) == rows.dtype == weight.dtype:
        return functional.linear(rows, weight)
    return _WideLinear.apply(rows, weight)  # type: ignore[no-any-return, no-untyped-call]


class _WideLinear(torch.autograd.Function):
    """Keeps its narrow inputs for backward, not their wide copies, which would be as large as a stage's residual."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return functional.linear(rows.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,), (rows, weight) = gradients, ctx.saved_tensors
        to_weight = gradient.flatten(0, -2).T @ rows.flatten(0, -2).float()
        # autograd rounds it to weight.grad_dtype, which may be wider than the weight
        return (gradient @ weight.float()).to(rows.dtype), to_weight
