"""Hugging Face's config.json of a Mixtral: its fields under our names."""

import json
from pathlib import Path
from typing import Any

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.files import read_text

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


def hugging_face_fields(path: Path) -> dict[str, Any]:
    """Fields of a ModelConfig, not yet checked; UserError if the file is no config that the engine can follow."""
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: malformed JSON ({error.msg})") from error
    if not isinstance(data, dict) or data.get("model_type") != "mixtral":
        found = data.get("model_type") if isinstance(data, dict) else type(data).__name__
        raise UserError(f"{path}: field model_type: expected 'mixtral', found {found!r}")
    _refuse_unsupported(path, data)
    rope = _rope(data)
    values = {ours: data[theirs] for theirs, ours in _HUGGING_FACE_FIELDS.items() if data.get(theirs) is not None}
    values.setdefault("rope_theta", rope.pop("rope_theta", 1e6))
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {name: value for name, value in rope.items() if value is not None}
    hidden, heads = values.get("hidden_size"), values.get("attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        values.setdefault("head_size", hidden // heads)
    name = Path(str(data.get("_name_or_path") or path.parent.resolve().name)).name or "model"
    return {"name": name, **values}


def _rope(data: dict[str, Any]) -> dict[str, Any]:
    """transformers 5's rope_parameters, or the rope_scaling of older versions, in which type stood for rope_type."""
    rope = dict(data.get("rope_parameters") or data.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    if rope["rope_type"] in ("llama3", "yarn") and "max_position_embeddings" in data:
        rope.setdefault("original_max_position_embeddings", data["max_position_embeddings"])
    return rope


def _refuse_unsupported(path: Path, data: dict[str, Any]) -> None:
    unsupported = {
        "hidden_act": data.get("hidden_act", "silu") != "silu",
        "sliding_window": data.get("sliding_window") is not None,
        "tie_word_embeddings": bool(data.get("tie_word_embeddings", False)),
    }
    for field, refused in unsupported.items():
        if refused:
            raise UserError(f"{path}: field {field}: the value {data.get(field)!r} is not supported by this engine")
