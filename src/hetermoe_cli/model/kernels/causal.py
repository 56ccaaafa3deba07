"""Causal attention on fused kernels, over whole sequences or inside documents, with values of any width."""

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hetermoe_cli.model.kernels import attention_products
from hetermoe_cli.model.kernels.documents import Documents

_FLASH_CAPABILITY, _FLASH_WIDEST_HEAD = (8, 0), 256  # FlashAttention 2's
_FLASH_NO_BACKWARD = range(193, 225), ((8, 0), (9, 0))  # such heads only on these: torch's sdp_utils.cpp
_LARGEST_SLOW = 2**14  # tokens of a sequence times width of a head


def attend(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents | None = None, scale: float | None = None
) -> Tensor:
    """query [B, heads, S, D], key [B, groups, S, D], value [B, groups, S, V] -> [B, heads, S, V]; with `documents`
    inside each only. As many heads of queries follow each other for each group of keys and values.

    Scores are multiplied by `scale`, 1 / sqrt(D) unless given.
    """
    scale, width = scale or 1 / math.sqrt(query.shape[-1]), value.shape[-1]
    flash = has_flash(query, value)
    over_documents = documents is not None and flash
    if query.shape[-1] != width and (over_documents or not query.is_cuda):
        query, key, value = _equally_wide(query, key, value)
    if not (flash and query.shape[-1] == value.shape[-1] and takes_groups(over_documents)):
        key, value = (_for_every_head(x, query.shape[1]) for x in (key, value))
    if documents is None:
        mixed = _fused(query, key, value, scale)
    else:
        mixed = _attend_within(query, key, value, documents, scale, _varlen if over_documents else _one_by_one)
    return mixed[..., :width]


def has_flash(query: Tensor, value: Tensor) -> bool:
    """Whether torch's FlashAttention on CUDA takes queries and values like these, made equally wide."""
    widest = max(query.shape[-1], value.shape[-1])
    if not (query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and widest % 8 == 0):
        return False
    capability, (no_backward, but_on) = torch.cuda.get_device_capability(query.device), _FLASH_NO_BACKWARD
    return (
        widest <= _FLASH_WIDEST_HEAD
        and capability >= _FLASH_CAPABILITY
        and (widest not in no_backward or capability in but_on)
    )


@cache
def takes_groups(over_documents: bool) -> bool:
    """Whether FlashAttention reads each group's keys and values where they are: older versions of torch do not over
    documents."""
    return not over_documents or "enable_gqa" in inspect.signature(_varlen_attn()).parameters


def _for_every_head(x: Tensor, heads: int) -> Tensor:
    """[B, groups, S, D] -> [B, heads, S, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _equally_wide(*tensors: Tensor) -> list[Tensor]:
    """Zeros at the end, which change no score and no value: FlashAttention, the only fused kernel of CPUs, knows one
    width. torch's way out would keep every score (at 1024 tokens on a CPU 11 times the memory, 3 times as slow)."""
    widest = max(x.shape[-1] for x in tensors)
    return [functional.pad(x, (0, widest - x.shape[-1])) if x.shape[-1] < widest else x for x in tensors]


def _attend_within(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, attend_to: Any
) -> Tensor:
    """One FlashAttention kernel for all documents where there is one, else a causal call for each: either skips what a
    mask would compute in vain (on a CPU 1 to 6 times as fast as a mask at 1024 tokens, up to 1.9 times as slow at 256).
    """
    batch, _, length, _ = query.shape
    tokens = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    mixed: Tensor = attend_to(*tokens, documents, scale)
    return mixed.view(batch, length, *mixed.shape[1:]).transpose(1, 2)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query [B, heads, S, D], key, value [B, heads or groups, S, D]: torch's best kernel, with a backward of our own
    where that is faster."""
    if attention_products.suits(query) or _is_slow_backward(query):
        return _OwnBackward.apply(query, key, value, scale)  # type: ignore[no-any-return, no-untyped-call]
    grouped = key.shape[1] != query.shape[1]
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


def _is_slow_backward(query: Tensor) -> bool:
    """Whether the CPU's kernel for these queries [B, heads, S, D] is slower in their precision than in fp32.

    Each of its products of blocks has costs of its own in bf16: 7 times fp32's time at S = 32, 1.7 at 256 x 32, 1.2
    at 256 x 64, but half of it at 1024 x 128. fp16's takes 1.2 to 8 times as long.
    """
    if query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return query.dtype == torch.float16 or query.shape[-2] * query.shape[-1] <= _LARGEST_SLOW


class _OwnBackward(torch.autograd.Function):
    """The CPU's FlashAttention, causal; backward is products in bf16, where those are fast, or its own in fp32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mixed, logsumexp = kernel(query, key, value, 0.0, True, scale=scale)
        ctx.save_for_backward(query, key, value, mixed, logsumexp)
        ctx.scale = scale
        return mixed  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, mixed, logsumexp = ctx.saved_tensors
        narrow = gradients[0], query, key, value, mixed
        if attention_products.suits(query):
            return *attention_products.backward(*narrow, logsumexp, ctx.scale), None
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        wide = (x.float() for x in narrow)
        found = kernel(*wide, logsumexp, 0.0, True, scale=ctx.scale)
        to_query, to_key, to_value = (x.to(gradients[0].dtype) for x in found)
        return to_query, to_key, to_value, None


def _varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> Tensor:
    """query [T, heads, D], key, value [T, heads or groups, D]."""
    longest, borders = max(documents.lengths), documents.borders
    known = inspect.signature(_varlen_attn()).parameters
    # older versions of torch: is_causal, and only the usual scale
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        options["scale"] = scale
    elif (ratio := scale * math.sqrt(query.shape[-1])) != 1:
        query = query * ratio
    if key.shape[1] != query.shape[1]:
        options["enable_gqa"] = True
    mixed = _varlen_attn()(query, key, value, borders, borders, longest, longest, **options)
    assert isinstance(mixed, Tensor)  # no auxiliary output was asked for
    return mixed


def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> Tensor:
    """All [T, heads, width of each]."""
    parts = [torch.split(x.transpose(0, 1)[None], documents.lengths, dim=2) for x in (query, key, value)]
    mixed = [_fused(q, k, v, scale) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(mixed, dim=2)[0].transpose(0, 1)
