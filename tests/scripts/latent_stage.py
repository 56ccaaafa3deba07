"""An attention stage with latent attention and shared experts in torch: what roofline.py counts, to be measured."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from hetermoe_cli.model.moe import combine
from hetermoe_cli.model.norm import RMSNorm
from hetermoe_cli.model.rope import rope_table, rotate
from hetermoe_cli.model.swiglu import swiglu
from hetermoe_cli.spec.latent import LatentAttention
from hetermoe_cli.spec.model import ModelConfig


class LatentStage(nn.Module):
    """Combine of the layer before, latent attention, gate, and shared experts on the residual."""

    def __init__(self, config: ModelConfig, sizes: LatentAttention) -> None:
        super().__init__()
        hidden, heads, width = config.hidden_size, config.attention_heads, config.shared_experts * config.ffn_size
        self.config, self.sizes = config, sizes
        self.attention_norm, self.expert_norm = RMSNorm(hidden), RMSNorm(hidden)
        self.query_down = nn.Linear(hidden, sizes.query_rank, bias=False)
        self.query_norm = RMSNorm(sizes.query_rank)
        self.query_up = nn.Linear(sizes.query_rank, heads * config.head_size, bias=False)
        self.down = nn.Linear(hidden, sizes.key_value_rank + sizes.rope_size, bias=False)
        self.norm = RMSNorm(sizes.key_value_rank)
        self.up = nn.Linear(sizes.key_value_rank, heads * (sizes.nope_size + sizes.value_size), bias=False)
        self.out = nn.Linear(heads * sizes.value_size, hidden, bias=False)
        self.gate = nn.Linear(hidden, config.experts, bias=False)
        self.shared_gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.shared_down = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden: Tensor, outputs: Tensor, weights: Tensor) -> list[Tensor]:
        """hidden [B, S, H], expert outputs [T, k, H], weights [T, k] -> hidden, rows, weights."""
        hidden = combine(hidden, outputs, weights)
        hidden = hidden + self._attend(self.attention_norm(hidden))
        normed = self.expert_norm(hidden)
        top, _ = self.gate(normed).flatten(0, 1).softmax(dim=-1).topk(self.config.top_k, dim=-1)
        hidden = hidden + self.shared_down(swiglu(self.shared_gate_up(normed)))
        return [hidden, normed.flatten(0, 1), top / top.sum(dim=-1, keepdim=True)]

    def _attend(self, x: Tensor) -> Tensor:
        sizes, heads = self.sizes, self.config.attention_heads
        batch, length, _ = x.shape
        cos, sin = rope_table(length, sizes.rope_size, 10000.0, x.device, x.dtype)
        query = self.query_up(self.query_norm(self.query_down(x))).view(batch, length, heads, -1).transpose(1, 2)
        plain, turned = query.split([sizes.nope_size, sizes.rope_size], dim=-1)
        query = torch.cat([plain, rotate(turned, cos, sin)], dim=-1)
        latent, turned = self.down(x).split([sizes.key_value_rank, sizes.rope_size], dim=-1)
        key_value = self.up(self.norm(latent)).view(batch, length, heads, -1).transpose(1, 2)
        plain, value = key_value.split([sizes.nope_size, sizes.value_size], dim=-1)
        one_for_all = rotate(turned[:, None], cos, sin).expand(-1, heads, -1, -1)
        key = torch.cat([plain, one_for_all], dim=-1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out
