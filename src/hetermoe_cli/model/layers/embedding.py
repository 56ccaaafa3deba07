"""The token embedding, whose gradient adds up in fp32."""

from typing import Any

import torch
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """nn.Embedding. Its own backward adds a token's occurrences in the weight's precision, where a bf16 sum of ones
    stops at 256."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] int64 -> [B, S, H]."""
        if self.weight.dtype == torch.promote_types(self.weight.dtype, torch.float32):
            return super().forward(tokens)
        return _Lookup.apply(tokens, self.weight)  # type: ignore[no-any-return, no-untyped-call]


class _Lookup(torch.autograd.Function):
    """Rows of a narrow table; the table's gradient is computed in fp32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = len(weight)
        return weight[tokens]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        wide = gradients[0].float()
        return None, torch.ops.aten.embedding_dense_backward(wide, tokens, ctx.rows, -1, False)
