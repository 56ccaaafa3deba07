"""The head's loss with its gradients, some tokens at a time, so that all logits never exist at once.

Autograd would keep the logits of a whole micro-batch in several copies until backward: 12 bytes for each token and
entry of the vocabulary, 7.5 GB for 4096 tokens of Qwen3. Forward knows the targets, so it finds the gradients as well,
of the same three products (Liger-Kernel's fused linear cross entropy, arXiv 2410.10989).
"""

from typing import Any

import torch
from torch import Tensor

from hetermoe_cli.spec.model import logit_tokens


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    """The summed cross entropy in nats, in fp32 or wider; hidden [T, H], weight [V, H], targets [T].

    Its gradients come times `scale`: those of logits are so before they are rounded to the precision of `hidden`, as
    fp16 needs it. That of `weight` is summed in fp32 or wider.
    """
    return _CrossEntropy.apply(hidden, weight, targets, scale, torch.is_grad_enabled())  # type: ignore[no-any-return, no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, training: bool) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total, to_weight = hidden.new_zeros((), dtype=wide), None
        to_hidden = torch.empty_like(hidden)
        parts = -(-len(hidden) // logit_tokens(len(weight)))
        for rows, wanted, found in zip(*(x.chunk(parts) for x in (hidden, targets[:, None], to_hidden)), strict=True):
            logits = (rows @ weight.T).to(wide)
            logits -= logits.amax(-1, keepdim=True)
            chosen = logits.gather(-1, wanted)
            sums = logits.exp_().sum(-1, keepdim=True)
            total += (sums.log() - chosen).sum()
            if training:
                logits *= scale / sums
                given = logits.scatter_add_(-1, wanted, torch.full_like(chosen, -scale)).to(hidden.dtype)
                torch.mm(given, weight, out=found)
                to_weight = _added(to_weight, given.T, rows, wide)
        ctx.gradients = to_hidden, to_weight
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        to_hidden, to_weight = ctx.gradients
        ctx.gradients = None
        return to_hidden.mul_(gradients[0]), to_weight.mul_(gradients[0]), None, None, None


def _added(total: Tensor | None, given: Tensor, rows: Tensor, wide: torch.dtype) -> Tensor:
    """total + given @ rows, the sum in `wide`."""
    if total is None:
        return (given @ rows).to(wide)
    return total.addmm_(given, rows) if rows.dtype == wide else total.add_(given @ rows)
