"""Hugging Face's config.json of a Mixtral, Qwen3-MoE or DeepSeek-V3: its fields under our names, and the other way."""

import json
from pathlib import Path
from typing import Any

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.files import read_text
from hetermoe_cli.spec.model import ModelConfig

_COMMON_FIELDS = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "attention_heads",
    "num_key_value_heads": "kv_heads",
    "num_experts_per_tok": "top_k",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "initializer_range",
}
_MIXTRAL_FIELDS = {"intermediate_size": "ffn_size", "head_dim": "head_size", "num_local_experts": "experts"}
_QWEN_FIELDS = {
    "moe_intermediate_size": "ffn_size",
    "head_dim": "head_size",
    "num_experts": "experts",
    "norm_topk_prob": "router_renormalise",
}
_DEEPSEEK_FIELDS = {
    "moe_intermediate_size": "ffn_size",
    "n_routed_experts": "experts",
    "n_shared_experts": "shared_experts",
    "first_k_dense_replace": "dense_layers",
    "scoring_func": "router_score",
    "norm_topk_prob": "router_renormalise",
    "routed_scaling_factor": "router_scale",
}
_LATENT_FIELDS = {
    "q_lora_rank": "query_rank",
    "kv_lora_rank": "key_value_rank",
    "qk_nope_head_dim": "nope_size",
    "qk_rope_head_dim": "rope_size",
    "v_head_dim": "value_size",
}
# Where the file is silent: the defaults of transformers' configuration classes.
_ROPE_THETA = {"mixtral": 1e6, "qwen3_moe": 1e4, "deepseek_v3": 1e4}
_NORM_EPSILON = {"mixtral": 1e-5, "qwen3_moe": 1e-6, "deepseek_v3": 1e-6}


def hugging_face_fields(path: Path) -> dict[str, Any]:
    """Fields of a ModelConfig, not yet checked; UserError if the file is no config that we can follow.

    Of DeepSeek-V3 the groups of experts in its gate and multi-token prediction are left out.
    """
    data = read_config(path)
    kind = data["model_type"]
    _refuse_unsupported(path, data)
    rope = _rope(path, data)
    values = _renamed(data, _COMMON_FIELDS)
    if "kv_heads" not in values and "num_key_value_heads" in data:  # null: as many as attention heads
        values |= _renamed(data, {"num_attention_heads": "kv_heads"})
    values |= {"mixtral": _mixtral, "qwen3_moe": _qwen, "deepseek_v3": _deepseek}[kind](path, data)
    values.setdefault("norm_epsilon", _NORM_EPSILON[kind])
    values.setdefault("rope_theta", rope.pop("rope_theta", _ROPE_THETA[kind]))
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {name: value for name, value in rope.items() if value is not None}
    hidden, heads = values.get("hidden_size"), values.get("attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        values.setdefault("head_size", hidden // heads)
    name = Path(str(data.get("_name_or_path") or path.parent.resolve().name)).name or "model"
    return {"name": name, **values}


def read_config(path: Path) -> dict[str, Any]:
    """A config.json as it is; UserError if it is of no model type that we know."""
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: malformed JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; lists in lists without end
        raise UserError(f"{path}: malformed JSON ({error})") from error
    kind = data.get("model_type") if isinstance(data, dict) else type(data).__name__
    if not isinstance(kind, str) or kind not in _ROPE_THETA:
        raise UserError(f"{path}: field model_type: expected 'mixtral', 'qwen3_moe' or 'deepseek_v3', found {kind!r}")
    return dict(data)


def model_type(model: ModelConfig) -> str:
    """Hugging Face's type that computes what this model does; UserError if it has none.

    Losses that balance the router and its capacity belong to training and are no part of it.
    """
    kind = "deepseek_v3" if model.latent else "qwen3_moe" if model.qk_norm else "mixtral"
    if model.latent:
        needed = {"router_score": model.router_score == "sigmoid", "shared_experts": model.shared_experts > 0}
    else:
        needed = {
            "dense_layers": model.qk_norm or not model.dense_layers,
            "shared_experts": not model.shared_experts,
            "router_score": model.router_score == "softmax",
            "router_renormalise": model.qk_norm or model.router_renormalise,
            "router_scale": model.router_scale == 1.0,
            "router_balance": model.router_balance != "bias",
        }
    needed["top_k"] = model.top_k > 1 or not model.router_renormalise  # theirs makes a single weight 1
    for field, same in needed.items():
        if not same:
            raise UserError(
                f"model {model.name}: field {field}: Hugging Face's {kind}, which is nearest to it, knows no "
                f"{getattr(model, field)!r}: there is no form to export it in"
            )
    return kind


def config_fields(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """config.json of `model`, trained on sequences of that length; UserError as of `model_type`."""
    kind, scaling = model_type(model), model.rope_scaling
    result = {"model_type": kind, "hidden_act": "silu", "tie_word_embeddings": False, **_given(model, _COMMON_FIELDS)}
    if model.latent:
        result |= {"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "rope_interleave": True}
        result |= {"n_group": 1, "topk_group": 1, "intermediate_size": model.dense_ffn_size or model.ffn_size}
        result |= _given(model, _DEEPSEEK_FIELDS) | _given(model.latent, _LATENT_FIELDS)
    elif model.qk_norm:
        result |= {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "use_sliding_window": False}
        result |= {"decoder_sparse_step": 1, "mlp_only_layers": list(range(model.dense_layers))}
        result |= {"intermediate_size": model.dense_ffn_size or model.ffn_size, **_given(model, _QWEN_FIELDS)}
    else:
        result |= {"architectures": ["MixtralForCausalLM"], "sliding_window": None, **_given(model, _MIXTRAL_FIELDS)}
    rope = scaling.model_dump(mode="json", exclude_none=True) if scaling else {"rope_type": "default"}
    reach = scaling.factor * getattr(scaling, "original_max_position_embeddings", 0) if scaling else 0
    return result | {
        "num_hidden_layers": model.layers + model.dense_layers,
        "max_position_embeddings": max(sequence_length, int(reach)),
        "rope_parameters": {"rope_theta": model.rope_theta, **rope},
    }


def _given(spec: object, names: dict[str, str]) -> dict[str, Any]:
    return {theirs: getattr(spec, ours) for theirs, ours in names.items()}


def _renamed(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: data[theirs] for theirs, ours in names.items() if data.get(theirs) is not None}


def _mixtral(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    return _renamed(data, _MIXTRAL_FIELDS)


def _qwen(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """What Qwen3-MoE has of its own: norms of queries and keys, dense layers by number, which must be the first."""
    dense = data.get("mlp_only_layers") or []
    if dense != list(range(len(dense) if isinstance(dense, list) else 0)):
        raise UserError(
            f"{path}: field mlp_only_layers: expected the first layers only, such as [0, 1], found {dense!r}"
        )
    values = _renamed(data, {"num_local_experts": "experts"})  # what transformers 5 writes for num_experts
    values |= {"qk_norm": True, "router_renormalise": False, **_renamed(data, _QWEN_FIELDS)}
    return values | _dense_first(path, data, "mlp_only_layers", len(dense))


def _dense_first(path: Path, data: dict[str, Any], field: str, dense: Any) -> dict[str, Any]:
    """Layers of a model whose first `dense`, by its `field`, have no experts."""
    layers, values = data.get("num_hidden_layers"), {"dense_layers": dense} if dense else {}
    if isinstance(layers, int):
        if not isinstance(dense, int) or not 0 <= dense < layers:
            raise UserError(
                f"{path}: field {field}: expected 0 to {layers - 1} dense layers of {layers}, so that a MoE layer "
                f"follows, found {dense!r}"
            )
        values["layers"] = layers - dense
    return values | (_renamed(data, {"intermediate_size": "dense_ffn_size"}) if dense else {})


def _deepseek(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """What DeepSeek-V3 has of its own: dense layers first, latent attention, its gate."""
    values = {"router_score": "sigmoid", **_renamed(data, _DEEPSEEK_FIELDS)}
    values |= _dense_first(path, data, "first_k_dense_replace", data.get("first_k_dense_replace") or 0)
    values["latent"] = latent = _renamed(data, _LATENT_FIELDS)
    if isinstance(nope := latent.get("nope_size"), int) and isinstance(rope := latent.get("rope_size"), int):
        values["head_size"] = nope + rope
    return values


def _rope(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """transformers 5's rope_parameters, or the rope_scaling of older versions, in which type stood for rope_type."""
    field = "rope_parameters" if data.get("rope_parameters") else "rope_scaling"
    given = data.get(field) or {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: field {field}: expected an object with a rope_type, or null, found {given!r}")
    rope = dict(given)
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    if rope["rope_type"] in ("llama3", "yarn") and "max_position_embeddings" in data:
        rope.setdefault("original_max_position_embeddings", data["max_position_embeddings"])
    return rope


def _refuse_unsupported(path: Path, data: dict[str, Any]) -> None:
    unsupported = {
        "hidden_act": data.get("hidden_act", "silu") != "silu",
        "sliding_window": data.get("sliding_window") is not None and data.get("use_sliding_window", True),
        "decoder_sparse_step": data.get("decoder_sparse_step", 1) != 1,
        "tie_word_embeddings": bool(data.get("tie_word_embeddings", False)),
        "attention_bias": bool(data.get("attention_bias", False)),
        "moe_layer_freq": data.get("moe_layer_freq", 1) != 1,
    }
    for field, refused in unsupported.items():
        if refused:
            raise UserError(f"{path}: field {field}: the value {data.get(field)!r} is not supported by this engine")
