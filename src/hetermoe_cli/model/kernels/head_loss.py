"""The head's loss with its gradients, some tokens at a time, so that all logits never exist at once.

Autograd has the logits of a whole micro-batch in several copies: 12 bytes for each token and entry of the vocabulary,
7.5 GB for 4096 tokens of Qwen3. Here forward, which knows the targets, finds the gradients as well, with the same three
products (as Liger-Kernel's fused linear cross entropy, arXiv 2410.10989).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hetermoe_cli.model.kernels.pieces import pieces
from hetermoe_cli.spec.model import logit_tokens


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    """The summed cross entropy in nats, in fp32 or wider; hidden [T, H], weight [V, H], targets [T].

    Its gradients come times `scale`: those of logits are so before they are rounded to the precision of `hidden`, as
    fp16 needs it; so leave scaling to it. That of `weight` is summed in fp32 or wider.
    """
    return _CrossEntropy.apply(hidden, weight, targets, scale, torch.is_grad_enabled())  # type: ignore[no-any-return, no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, training: bool) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total, to_weight = hidden.new_zeros((), dtype=wide), weight.new_empty(0, dtype=wide)
        to_hidden, training = torch.empty_like(hidden), training and any(ctx.needs_input_grad)
        parts = max(1, -(-len(hidden) // logit_tokens(len(weight))))
        for rows, wanted, out in zip(*(x.chunk(parts) for x in (hidden, targets[:, None], to_hidden)), strict=True):
            total, given = _loss_and_gradient(total, rows @ weight.T, wanted, scale if training else None)
            if given is not None:
                torch.mm(given, weight, out=out)
                to_weight = _added(to_weight, given.T, rows)
            del given  # before there are logits of others
        ctx.gradients = to_hidden, to_weight
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        to_hidden, to_weight = ctx.gradients
        ctx.gradients = None  # each is given away
        return to_hidden.mul_(gradients[0]), to_weight.mul_(gradients[0]), None, None, None


def _loss_and_gradient(
    total: Tensor, logits: Tensor, wanted: Tensor, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """total + the summed cross entropy of logits [T, V] for wanted [T, 1], and if there is a `scale` the gradient of
    logits times it, in their precision. In few passes: they are what a head reads and writes most. So the loss is taken
    from probabilities, of which none counts as less than the smallest normal number (87 nats in fp32)."""
    shares = torch.softmax(logits, -1, dtype=total.dtype)
    chosen = shares.gather(-1, wanted)
    total = total - chosen.clamp_min(torch.finfo(chosen.dtype).tiny).log().sum()
    if scale is None:
        return total, None
    shares.scatter_(-1, wanted, chosen - 1)
    return total, torch.mul(shares, scale, out=logits)


def _added(total: Tensor, given: Tensor, rows: Tensor) -> Tensor:
    """total + given @ rows, the sum in the precision of `total`, which is empty at first."""
    if not len(total):
        return (given @ rows).to(total.dtype)
    if rows.dtype == total.dtype:
        return total.addmm_(given, rows)
    for part, more in pieces(total, given @ rows):  # which a CPU makes wide to add them
        part.add_(more)
    return total
