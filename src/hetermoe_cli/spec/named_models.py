"""Named sizes, and what --model takes: one of them, or a file."""

from pathlib import Path
from typing import Any

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.files import load, parse
from hetermoe_cli.spec.hugging_face import hugging_face_fields
from hetermoe_cli.spec.latent import LatentAttention
from hetermoe_cli.spec.model import ModelConfig


def _mixtral(name: str, layers: int, hidden: int, experts: int, **other: Any) -> ModelConfig:
    # FFN 3.5 x hidden, head size 128, 4 query heads per KV head: Mixtral-8x7B's proportions.
    fields = {
        "ffn_size": hidden * 7 // 2,
        "attention_heads": hidden // 128,
        "kv_heads": hidden // 512,
        "head_size": 128,
        "top_k": 2,
        "vocab_size": 32000,
        **other,
    }
    return ModelConfig(name=name, layers=layers, hidden_size=hidden, experts=experts, **fields)


def _qwen3(name: str, layers: int, hidden: int, ffn: int, heads: int) -> ModelConfig:
    return ModelConfig(
        name=name,
        layers=layers,
        hidden_size=hidden,
        ffn_size=ffn,
        attention_heads=heads,
        kv_heads=4,
        head_size=128,
        experts=128,
        top_k=8,
        vocab_size=151936,
        qk_norm=True,
        rope_theta=1e6,
        norm_epsilon=1e-6,
    )


# DeepSeek-V3: 61 layers, the first three dense. The groups of experts in its gate and multi-token prediction are not
# modelled.
_DEEPSEEK_V3 = ModelConfig(
    name="deepseek-v3",
    layers=58,
    hidden_size=7168,
    ffn_size=2048,
    attention_heads=128,
    kv_heads=128,
    head_size=192,
    experts=256,
    top_k=8,
    vocab_size=129280,
    shared_experts=1,
    dense_layers=3,
    dense_ffn_size=18432,
    latent=LatentAttention(query_rank=1536, key_value_rank=512, nope_size=128, rope_size=64, value_size=128),
    router_score="sigmoid",
    router_scale=2.5,
    router_balance="bias",
    router_bias_rate=0.001,
    router_auxiliary_loss=0.0001,
    rope_theta=10000.0,
    norm_epsilon=1e-6,
)

NAMED_MODELS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        _mixtral("mixtral-w1", 4, 2048, 12),
        _mixtral("mixtral-w2", 4, 2048, 24),
        _mixtral("mixtral-d1", 8, 1024, 24),
        _mixtral("mixtral-d2", 6, 1024, 18),
        _mixtral("mixtral-d3", 8, 1024, 40),
        _mixtral("mixtral-8x7b", 32, 4096, 8, rope_theta=1e6),
        _mixtral("tiny", 2, 64, 4, attention_heads=4, kv_heads=2, head_size=16, vocab_size=256, ffn_size=224),
        _mixtral("small", 4, 128, 8, attention_heads=4, kv_heads=2, head_size=32, vocab_size=256, ffn_size=256),
        _qwen3("qwen3-30b-a3b", 48, 2048, 768, 32),
        _qwen3("qwen3-235b", 94, 4096, 1536, 64),
        _DEEPSEEK_V3,
    )
}


def load_model(name_or_path: str) -> ModelConfig:
    """A named size, a YAML ModelConfig, or Hugging Face's config.json (mixtral, qwen3_moe or deepseek_v3)."""
    if name_or_path in NAMED_MODELS:
        return NAMED_MODELS[name_or_path]
    path = Path(name_or_path)
    if not path.exists():
        names = ", ".join(NAMED_MODELS)
        raise UserError(f"model {name_or_path!r}: neither a file nor a named size ({names})")
    if path.suffix == ".json":
        return parse(ModelConfig, hugging_face_fields(path), str(path))
    return load(ModelConfig, path)
