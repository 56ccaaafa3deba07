"""Packed documents: where they end, positions that restart in each, and attention that stays inside."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hetermoe_cli.model.copies import upload

_VARLEN_CAPABILITY, _VARLEN_WIDEST_HEAD = (8, 0), 256  # FlashAttention 2's


class Documents(NamedTuple):
    """The N documents in tokens [B, S], cut where a sequence ends; T = B * S.

    `positions` [B, S] int64 inside a document, `borders` [N + 1] int32 in all T tokens, `lengths` of the documents.
    """

    positions: Tensor
    borders: Tensor
    lengths: list[int]


def find_documents(tokens: Tensor, end: int, device: torch.device) -> Documents:
    """Documents in tokens [B, S] on the CPU, each ending with the token `end`; the result's tensors are on `device`."""
    ends = tokens == end
    ends[:, -1] = True
    after = ends.flatten().nonzero().flatten() + 1
    borders = torch.cat([after.new_zeros(1), after])
    lengths = borders.diff()
    positions = torch.arange(tokens.numel()) - borders[:-1].repeat_interleave(lengths)
    return Documents(upload(positions.view_as(tokens), device), upload(borders.int(), device), lengths.tolist())


def attend_within(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document; all [B, heads, S, D].

    One FlashAttention kernel for all documents where there is one, else a causal call for each: either skips what a
    mask would compute in vain (on a CPU 1 to 6 times as fast as a mask at 1024 tokens, up to 1.9 times as slow at 256).
    """
    batch, heads, length, size = query.shape
    query, key, value = (x.transpose(1, 2).reshape(batch * length, heads, size) for x in (query, key, value))
    attend = _varlen if has_varlen(query) else _one_by_one
    return attend(query, key, value, documents).view(batch, length, heads, size).transpose(1, 2)


def has_varlen(query: Tensor) -> bool:
    """Whether torch's FlashAttention over documents takes queries like this one."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= _VARLEN_WIDEST_HEAD
        and torch.cuda.get_device_capability(query.device) >= _VARLEN_CAPABILITY
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest, borders = max(documents.lengths), documents.borders
    window = "window_size" in inspect.signature(varlen_attn).parameters  # is_causal in older versions of torch
    causal: dict[str, Any] = {"window_size": (-1, 0)} if window else {"is_causal": True}
    mixed = varlen_attn(query, key, value, borders, borders, longest, longest, **causal)
    assert isinstance(mixed, Tensor)  # no auxiliary output was asked for
    return mixed


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """All [T, heads, D]."""
    parts = [torch.split(x.transpose(0, 1)[None], documents.lengths, dim=2) for x in (query, key, value)]
    mixed = [functional.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(mixed, dim=2)[0].transpose(0, 1)
