"""Multi-head latent attention: queries, keys and values out of latents that are narrower than all heads together."""

import math

import torch
from torch import Tensor, nn

from hetermoe_cli.model.kernels.rope import magnitude, rotate
from hetermoe_cli.model.layers.norm import RMSNorm
from hetermoe_cli.spec.latent import LatentAttention
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.rope import YarnScaling

_NORM_EPSILON = 1e-6  # of the latents; transformers does not take the config's either


class LatentProjections(nn.Module):
    """DeepSeek-V2's MLA (arXiv 2405.04434, section 2.1) as training runs it: every head's keys and values in full.

    Down to a latent, RMSNorm, up to the heads, for queries and for keys with values. RoPE turns a part of every query
    and one key part that all heads share; this comes straight from the tokens, beside the latent.
    """

    def __init__(self, config: ModelConfig, sizes: LatentAttention) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.attention_heads
        self.heads, self.sizes = heads, sizes
        self.query_down = nn.Linear(hidden, sizes.query_rank, bias=False)
        self.query_norm = RMSNorm(sizes.query_rank, eps=_NORM_EPSILON)
        self.query_up = nn.Linear(sizes.query_rank, heads * (sizes.nope_size + sizes.rope_size), bias=False)
        self.key_value_down = nn.Linear(hidden, sizes.key_value_rank + sizes.rope_size, bias=False)
        self.key_value_norm = RMSNorm(sizes.key_value_rank, eps=_NORM_EPSILON)
        self.key_value_up = nn.Linear(sizes.key_value_rank, heads * (sizes.nope_size + sizes.value_size), bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, H] -> query and key [B, heads, S, nope + rope], value [B, heads, S, value]; cos and sin: rotate."""
        sizes = self.sizes
        query = self._heads(self.query_up(self.query_norm(self.query_down(x))))
        plain, turned = torch.split(query, [sizes.nope_size, sizes.rope_size], dim=-1)
        query = torch.cat([plain, rotate(turned, cos, sin)], dim=-1)
        latent, shared = self.key_value_down(x).split([sizes.key_value_rank, sizes.rope_size], dim=-1)
        key_value = self._heads(self.key_value_up(self.key_value_norm(latent)))
        plain, value = torch.split(key_value, [sizes.nope_size, sizes.value_size], dim=-1)
        turned = rotate(shared[:, None], cos, sin).expand(-1, self.heads, -1, -1)
        return query, torch.cat([plain, turned], dim=-1), value

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)


def softmax_scale(config: ModelConfig) -> float:
    """What latent attention multiplies scores by: 1 / sqrt(width of a key), and under YaRN with `mscale_all_dim` the
    square of its magnitude, as DeepSeek lengthens the part without position too."""
    scale, scaling = 1 / math.sqrt(config.head_size), config.rope_scaling
    if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim:
        scale *= magnitude(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale
