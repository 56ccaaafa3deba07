"""Layers without their routed experts: the attention stage of a MoE layer, and the dense layers that come before."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hetermoe_cli.model.kernels.causal import attend
from hetermoe_cli.model.kernels.documents import Documents
from hetermoe_cli.model.kernels.rope import rope_table, rotate
from hetermoe_cli.model.kernels.swiglu import swiglu
from hetermoe_cli.model.layers.gate import Gate, Router
from hetermoe_cli.model.layers.latent import LatentProjections, softmax_scale
from hetermoe_cli.model.layers.norm import RMSNorm
from hetermoe_cli.spec.model import ModelConfig


class Routed(NamedTuple):
    """What an attention stage hands on: T = B * S tokens, k choices each.

    `hidden` [B, S, H] is the residual; `rows` [T, H] what experts read; `weights` [T, k] the combine weights
    (they carry the gate's gradient); `experts` [T, k] the chosen experts, int64, E where dropped; `losses` [2] the
    gate's own, if any.
    """

    hidden: Tensor
    rows: Tensor
    weights: Tensor
    experts: Tensor
    losses: Tensor | None = None


class Attention(nn.Module):
    """Pre-norm causal attention with RoPE, grouped-query or latent, added to the residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.latent = LatentProjections(config, config.latent) if config.latent else None
        if self.latent is None:
            widths = (config.attention_heads + 2 * config.kv_heads) * config.head_size
            self.qkv = nn.Linear(config.hidden_size, widths, bias=False)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_size, eps=config.norm_epsilon)
            self.key_norm = RMSNorm(config.head_size, eps=config.norm_epsilon)
        self.scale = softmax_scale(config) if config.latent else None
        self.out = nn.Linear(config.attention_heads * config.value_size, config.hidden_size, bias=False)

    def attended(self, hidden: Tensor, documents: Documents | None = None) -> Tensor:
        """hidden [B, S, H] -> the same with attention added; with `documents` no token attends to another document."""
        return hidden + self._attend(self.attention_norm(hidden), documents)

    def _attend(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        c = self.config
        cos, sin = rope_table(x.shape[1], c.rope_size, c.rope_theta, x.device, x.dtype, c.rope_scaling)
        if documents is not None:
            cos, sin = cos[documents.positions][:, None], sin[documents.positions][:, None]
        query, key, value = self._grouped(x, cos, sin) if self.latent is None else self.latent(x, cos, sin)
        mixed = attend(query, key, value, documents, self.scale)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _grouped(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, H] -> query [B, heads, S, D], key and value [B, KV heads, S, D]."""
        c = self.config
        heads = self.qkv(x).view(*x.shape[:-1], -1, c.head_size).transpose(1, 2)
        query, key, value = torch.split(heads, [c.attention_heads, c.kv_heads, c.kv_heads], dim=1)
        if c.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query, cos, sin), rotate(key, cos, sin), value


class AttentionBlock(Attention):
    """Attention, then the expert norm, the gate and the shared experts of one MoE layer."""

    def __init__(self, config: ModelConfig, router: Router = "learned") -> None:
        super().__init__(config)
        self.expert_norm = RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.gate = Gate(config, router)
        width = config.shared_experts * config.ffn_size  # every token visits all of them: one network
        self.shared = SwiGLU(config.hidden_size, width) if width else None

    def forward(self, hidden: Tensor, documents: Documents | None = None) -> Routed:
        """hidden [B, S, H] -> Routed."""
        hidden = self.attended(hidden, documents)
        normed = self.expert_norm(hidden)
        weights, experts, losses = self.gate(normed)
        if self.shared is not None:
            hidden = hidden + self.shared(normed)
        return Routed(hidden, normed.flatten(0, 1), weights, experts, losses)


class DenseBlock(Attention):
    """A dense layer: attention, then a SwiGLU network that every token visits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.ffn = SwiGLU(config.hidden_size, config.dense_ffn_size)

    def forward(self, hidden: Tensor, documents: Documents | None = None) -> Tensor:
        """hidden [B, S, H] -> [B, S, H]."""
        hidden = self.attended(hidden, documents)
        return hidden + self.ffn(self.ffn_norm(hidden))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """silu(gate) * up, projected down; `width` is that of gate and up."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, normed: Tensor) -> Tensor:
        """normed [B, S, H] -> [B, S, H]."""
        return self.down(swiglu(self.gate_up(normed)))  # type: ignore[no-any-return]
