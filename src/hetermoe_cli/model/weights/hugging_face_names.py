"""Which of Hugging Face's tensors make up each of ours, for Mixtral, Qwen3-MoE and DeepSeek-V3 in their on-disk form.

Every tensor of ours is some of theirs on top of each other. Of latent attention, theirs hold the dimensions that RoPE
turns together next to each other (`rope_interleave`), ours have them half a part away from each other.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hetermoe_cli.spec.hugging_face import model_type
from hetermoe_cli.spec.latent import LatentAttention
from hetermoe_cli.spec.model import ModelConfig

BIAS = "gate.selection_bias"


class Piece(NamedTuple):
    """Hugging Face's tensor `name` holds these rows of ours, in its own order."""

    name: str
    rows: slice | Tensor = slice(None)


Pieces = dict[str, list[Piece]]


def pieces(config: ModelConfig, *, interleaved: bool = True) -> Pieces:
    """What each tensor of ours is made of, by our name, selection biases too where Hugging Face has them."""
    attention = _attention(config, interleaved)
    dense = {
        "ffn_norm.weight": [Piece("post_attention_layernorm.weight")],
        **_swiglu("ffn.gate_up.weight", "ffn.down.weight", "mlp.", config.dense_ffn_size),
    }
    result = {
        "embedding.weight": [Piece("model.embed_tokens.weight")],
        "norm.weight": [Piece("model.norm.weight")],
        "head.weight": [Piece("lm_head.weight")],
    }
    for layer in range(config.dense_layers):
        result |= _placed(attention | dense, f"dense_layers.{layer}.", layer)
    moe = attention | _moe(config)
    for layer in range(config.layers):
        result |= _placed(moe, f"layers.{layer}.", config.dense_layers + layer)
    return result


def _placed(parts: Pieces, prefix: str, number: int) -> Pieces:
    """A layer's pieces with its own numbers in front."""
    return {
        prefix + ours: [Piece(f"model.layers.{number}.{theirs.name}", theirs.rows) for theirs in found]
        for ours, found in parts.items()
    }


def _attention(config: ModelConfig, interleaved: bool) -> Pieces:
    common = {
        "attention_norm.weight": [Piece("input_layernorm.weight")],
        "out.weight": [Piece("self_attn.o_proj.weight")],
    }
    if config.latent:
        return common | _latent(config.latent, config.attention_heads, interleaved)
    query, key = config.attention_heads * config.head_size, config.kv_heads * config.head_size
    names = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    if config.qk_norm:
        norms = {"query_norm": "q_norm", "key_norm": "k_norm"}
        common |= {f"{ours}.weight": [Piece(f"self_attn.{theirs}.weight")] for ours, theirs in norms.items()}
    return common | {"qkv.weight": _on_top(dict(zip(names, (query, key, key), strict=True)))}


def _latent(sizes: LatentAttention, heads: int, interleaved: bool) -> Pieces:
    queries = torch.arange(heads * (sizes.nope_size + sizes.rope_size)).view(heads, -1)
    down = torch.arange(sizes.key_value_rank + sizes.rope_size)[None]
    if interleaved:
        queries, down = _interleaved(queries, sizes.rope_size), _interleaved(down, sizes.rope_size)
    names = {
        "query_down": Piece("q_a_proj"),
        "query_norm": Piece("q_a_layernorm"),
        "query_up": Piece("q_b_proj", queries.flatten()),
        "key_value_down": Piece("kv_a_proj_with_mqa", down.flatten()),
        "key_value_norm": Piece("kv_a_layernorm"),
        "key_value_up": Piece("kv_b_proj"),
    }
    return {f"latent.{o}.weight": [Piece(f"self_attn.{t.name}.weight", t.rows)] for o, t in names.items()}


def _interleaved(rows: Tensor, rope: int) -> Tensor:
    """rows [heads, width]: of the last `rope` of a head, first and second half by turns."""
    plain, turned = rows[:, :-rope], rows[:, -rope:]
    return torch.cat([plain, turned.view(len(rows), 2, -1).transpose(1, 2).flatten(1)], dim=1)


def _moe(config: ModelConfig) -> Pieces:
    kind = model_type(config)
    block = "block_sparse_moe." if kind == "mixtral" else "mlp."
    result = {
        "expert_norm.weight": [Piece("post_attention_layernorm.weight")],
        "gate.weight": [Piece(f"{block}gate.weight")],
    }
    names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for expert in range(config.experts):
        ours, theirs = f"experts.{expert}.", f"{block}experts.{expert}."
        result |= _swiglu(ours + "gate_up", ours + "down", theirs, config.ffn_size, names)
    if kind == "deepseek_v3":
        width = config.shared_experts * config.ffn_size
        result |= _swiglu("shared.gate_up.weight", "shared.down.weight", "mlp.shared_experts.", width)
        result[BIAS] = [Piece("mlp.gate.e_score_correction_bias")]
    return result


def _swiglu(
    gate_up: str,
    down: str,
    theirs: str,
    width: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Pieces:
    first, second, third = (f"{theirs}{name}.weight" for name in names)
    return {gate_up: _on_top({first: width, second: width}), down: [Piece(third)]}


def _on_top(heights: Mapping[str, int]) -> list[Piece]:
    result, start = [], 0
    for name, height in heights.items():
        result.append(Piece(name, slice(start, start + height)))
        start += height
    return result
