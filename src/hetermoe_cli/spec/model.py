"""ModelConfig: a Mixtral-style decoder, named sizes, and Hugging Face config.json."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.base import NonNegativeFloat, PositiveFloat, PositiveInt, Spec
from hetermoe_cli.spec.files import load, parse, read_text


class LayerShape(Spec):
    """What a kernel measurement depends on: the widths of one layer and of the head, and the rows combined a token.

    The number of experts is not among them: it only enters the gate, less than 1 % of an attention stage's flops.
    """

    hidden_size: PositiveInt
    ffn_size: PositiveInt
    attention_heads: PositiveInt
    kv_heads: PositiveInt
    head_size: PositiveInt
    top_k: PositiveInt
    vocab_size: PositiveInt

    def label(self) -> str:
        """Short text for errors and tables."""
        return (
            f"hidden {self.hidden_size}, ffn {self.ffn_size}, heads {self.attention_heads}/{self.kv_heads}"
            f"x{self.head_size}, top-{self.top_k}, vocab {self.vocab_size}"
        )


class ModelConfig(Spec):
    """Decoder with GQA attention (RoPE), RMSNorm, SwiGLU experts and a top-k softmax gate.

    The gate takes the softmax over all experts, keeps the top k and renormalises them (Mixtral; not for k = 1).
    """

    kind: Literal["model"] = "model"
    schema_version: Literal[1] = 1
    name: str
    layers: PositiveInt
    hidden_size: PositiveInt
    ffn_size: PositiveInt
    attention_heads: PositiveInt
    kv_heads: PositiveInt
    head_size: PositiveInt
    experts: PositiveInt
    top_k: PositiveInt
    vocab_size: PositiveInt
    rope_theta: PositiveFloat = 10000.0
    norm_epsilon: PositiveFloat = 1e-5
    initializer_range: NonNegativeFloat = 0.02

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is larger than experts {self.experts}")
        if self.attention_heads % self.kv_heads:
            raise ValueError(f"attention_heads {self.attention_heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} must be even for RoPE")
        return self

    @property
    def shape(self) -> LayerShape:
        """The widths that select a profile's kernel table."""
        return LayerShape(**{name: getattr(self, name) for name in LayerShape.model_fields})

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert (three SwiGLU matrices)."""
        return 3 * self.hidden_size * self.ffn_size

    @property
    def attention_layer_parameters(self) -> int:
        """Parameters of one layer without its experts: projections, gate, two norms."""
        query = self.attention_heads * self.head_size
        key = self.kv_heads * self.head_size
        return self.hidden_size * (2 * query + 2 * key + self.experts + 2)

    @property
    def edge_parameters(self) -> int:
        """Parameters outside the layers: embedding, LM head (untied), final norm."""
        return self.hidden_size * (2 * self.vocab_size + 1)

    @property
    def dense_parameters(self) -> int:
        """Everything that an attending device holds besides experts."""
        return self.layers * self.attention_layer_parameters + self.edge_parameters

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.dense_parameters + self.layers * self.experts * self.expert_parameters


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
    )
}

_HUGGING_FACE_FIELDS = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_attention_heads": "attention_heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_size",
    "num_local_experts": "experts",
    "num_experts_per_tok": "top_k",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "initializer_range",
}


def load_model(name_or_path: str) -> ModelConfig:
    """A named size, a YAML ModelConfig, or a Hugging Face config.json (model_type mixtral)."""
    if name_or_path in NAMED_MODELS:
        return NAMED_MODELS[name_or_path]
    path = Path(name_or_path)
    if not path.exists():
        names = ", ".join(NAMED_MODELS)
        raise UserError(f"model {name_or_path!r}: neither a file nor a named size ({names})")
    return _from_hugging_face(path) if path.suffix == ".json" else load(ModelConfig, path)


def _from_hugging_face(path: Path) -> ModelConfig:
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: malformed JSON ({error.msg})") from error
    if not isinstance(data, dict) or data.get("model_type") != "mixtral":
        found = data.get("model_type") if isinstance(data, dict) else type(data).__name__
        raise UserError(f"{path}: field model_type: expected 'mixtral', found {found!r}")
    _refuse_unsupported(path, data)
    rope = data.get("rope_parameters") or {}
    values = {ours: data[theirs] for theirs, ours in _HUGGING_FACE_FIELDS.items() if data.get(theirs) is not None}
    values.setdefault("rope_theta", rope.get("rope_theta", 1e6))
    hidden, heads = values.get("hidden_size"), values.get("attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        values.setdefault("head_size", hidden // heads)
    name = Path(str(data.get("_name_or_path") or path.parent.resolve().name)).name or "model"
    return parse(ModelConfig, {"name": name, **values}, str(path))


def _refuse_unsupported(path: Path, data: dict[str, Any]) -> None:
    scaling = data.get("rope_scaling") or {}
    unsupported = {
        "hidden_act": data.get("hidden_act", "silu") != "silu",
        "sliding_window": data.get("sliding_window") is not None,
        "tie_word_embeddings": bool(data.get("tie_word_embeddings", False)),
        "rope_parameters": (data.get("rope_parameters") or {}).get("rope_type", "default") != "default",
        "rope_scaling": scaling.get("rope_type", scaling.get("type", "default")) != "default",
    }
    for field, refused in unsupported.items():
        if refused:
            raise UserError(f"{path}: field {field}: the value {data.get(field)!r} is not supported by this engine")
