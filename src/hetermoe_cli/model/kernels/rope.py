"""Rotary position embedding: frequencies, scaled where the model says so, their table, and the rotation.

Scaled frequencies are transformers' (modeling_rope_utils.py), in float64.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hetermoe_cli.spec.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling


@lru_cache(maxsize=8)  # every stage of a run asks for the same one
def rope_table(
    length: int,
    head_size: int,
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [S, head_size / 2]."""
    frequency, factor = frequencies(head_size, theta, scaling)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency).to(device)
    return (factor * angle.cos()).to(dtype), (factor * angle.sin()).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [B, heads, S, head_size], halves convention (Hugging Face's rotate_half).

    cos and sin: [S, head_size / 2], or [B, 1, S, head_size / 2] where every sequence has positions of its own.
    """
    return _Rotation.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _Rotation(torch.autograd.Function):
    """Three passes over x each way (backward turns it the other way); composed there would be twice as many.

    Over whole heads: a bf16 kernel of a CPU takes 32 elements at once, and is four times as slow on halves of 16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x, torch.cat([cos, cos], -1), out=result)
    return result.addcmul_(x.roll(x.shape[-1] // 2, -1), torch.cat([-sin, sin], -1), value=sign)


def frequencies(head_size: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Radians a position, [head_size / 2] float64 on the CPU, and what cos and sin are multiplied by."""
    plain = theta ** -(torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    match scaling:
        case None:
            return plain, 1.0
        case LinearScaling():
            return plain / scaling.factor, 1.0
        case Llama3Scaling():
            return _llama3(plain, scaling), 1.0
        case YarnScaling():
            return _yarn(plain, head_size, theta, scaling), _attention_factor(scaling)


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / scaling.factor * (1 - kept)


def _yarn(plain: Tensor, head_size: int, theta: float, scaling: YarnScaling) -> Tensor:
    def dimension(turns: float) -> float:
        """Index of the frequency that makes so many turns in the first context length."""
        ratio = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_size * math.log(ratio) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    width = high - low or 0.001
    kept = 1 - ((torch.arange(len(plain), dtype=torch.float64) - low) / width).clamp(0, 1)
    return plain * kept + plain / scaling.factor * (1 - kept)


def _attention_factor(scaling: YarnScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.factor, scaling.mscale) / magnitude(scaling.factor, scaling.mscale_all_dim)
    return magnitude(scaling.factor, 1.0)


def magnitude(factor: float, weight: float) -> float:
    """YaRN's mscale: how much longer queries and keys should be where sequences are `factor` times as long."""
    return 0.1 * weight * math.log(factor) + 1
