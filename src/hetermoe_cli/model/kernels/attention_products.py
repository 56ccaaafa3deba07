"""Backward of causal attention as products of matrices, for CPUs with fast ones in bf16.

torch's FlashAttention for CPUs spends most of its backward beside its products, which are of small blocks. Here a block
of queries of all heads meets its keys in one product (oneDNN). Only bf16 comes out of such products, so what is large
is taken off inside them, in fp32: P = exp(scale * (q k - logsumexp / scale)) and dS = P (dO v - dO o), each with its
last term as two more columns (its two halves in bf16; the other side has ones there). What is rounded is then small
where P is large. Rows of n keys have P of about 1 / n; they are multiplied by a power of two near the square root of n,
and dO is divided by it. Gradients are then off by 0.3 to 0.8 % in their norm, the kernel's own by 0.2 to 0.7 %.
"""

import math

import torch
from torch import Tensor

from hetermoe_cli.model.kernels.row_blocks import are_compiled

_BLOCK = 128  # queries at a time, of which each sees half a block in vain
_LONGEST = 2048  # tokens; there FlashAttention takes 1.2 times as long (2 at 512 x 64, 1.3 at 1024 x 128)
_LARGEST_TILE = 2**20  # scores at a time, 2 MiB: of more heads than fit, some after others


def suits(query: Tensor) -> bool:
    """Whether products are the faster way for queries [B, heads, S, D]; few different S, as each has its kernels."""
    length = query.shape[-2]
    return query.dtype == torch.bfloat16 and length <= _LONGEST and length % _BLOCK == 0 and are_compiled(query)


def backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of `mixed`, what attention made of query, key and value, to theirs; all [B, heads, S, D].

    `logsumexp` [B, heads, S] is that of each query's scores, which were multiplied by `scale`.
    """
    shape, length, width = query.shape, query.shape[-2], query.shape[-1]
    q, k, v = (x.reshape(-1, length, width) for x in (query, key, value))
    exponents = torch.arange(1.0, length + 1).log2().div(2).round()[:, None]
    given = gradient.reshape(q.shape) * torch.exp2(-exponents).to(gradient.dtype)
    offsets = (logsumexp.reshape(-1, length, 1) - exponents * math.log(2)) / scale
    inner = torch.linalg.vecdot(given.float(), mixed.reshape(q.shape).float())[..., None]
    ones = q.new_ones(1).expand(len(q), length, 2)
    less_offset, less_inner = _with_columns(q, -offsets), _with_columns(given, -inner)
    k_ones, v_ones = torch.cat([k, ones], -1), torch.cat([v, ones], -1)
    to_q, to_k, to_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    nothing, heads = q.new_empty(()), max(1, _LARGEST_TILE // (_BLOCK * length))
    for first in range(0, len(q), heads):
        some = slice(first, first + heads)
        for begin in range(length - _BLOCK, -1, -_BLOCK):  # the last queries see all keys: theirs is written, not added
            end, more = begin + _BLOCK, int(begin + _BLOCK < length)
            rows, seen = (some, slice(begin, end)), (some, slice(end))
            weights = torch.baddbmm(nothing, less_offset[rows], k_ones[seen].mT, beta=0, alpha=scale).exp_()
            weights[..., begin:].tril_()
            to_scores = torch.bmm(less_inner[rows], v_ones[seen].mT).mul_(weights)
            torch.baddbmm(nothing, to_scores, k[seen], beta=0, alpha=scale, out=to_q[rows])
            torch.baddbmm(to_k[seen], to_scores.mT, q[rows], beta=more, alpha=scale, out=to_k[seen])
            torch.baddbmm(to_v[seen], weights.mT, given[rows], beta=more, out=to_v[seen])
    return to_q.view(shape), to_k.view(shape), to_v.view(shape)


def _with_columns(x: Tensor, column: Tensor) -> Tensor:
    """x [N, S, D] and column [N, S, 1] in fp32 -> [N, S, D + 2], the column in two parts."""
    high = column.to(x.dtype)
    return torch.cat([x, high, (column - high).to(x.dtype)], -1)
