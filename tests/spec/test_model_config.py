"""spec/model.py, spec/named_models.py: named sizes, YAML and Hugging Face config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from builders import make_model
from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.base import sha256
from hetermoe_cli.spec.files import dump, parse
from hetermoe_cli.spec.latent import LatentAttention
from hetermoe_cli.spec.model import MOST_EXPERTS, MOST_LAYERS, ROUTER_FIELDS, LayerShape, ModelConfig
from hetermoe_cli.spec.named_models import NAMED_MODELS, load_model
from hetermoe_cli.spec.rope import LinearScaling, YarnScaling

# A config.json in the form that transformers 5 writes for Mixtral-8x7B.
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "head_dim": None,
    "initializer_range": 0.02,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}

# As published with DeepSeek-V3, without fields that say nothing of its layers.
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
# As published for Qwen3-30B-A3B.
QWEN = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LATENT = {"query_rank": 24, "key_value_rank": 20, "nope_size": 10, "rope_size": 6, "value_size": 12}


def config_file(folder: Path, **changes: Any) -> str:
    """Write MIXTRAL with `changes`; a change to ... removes the field."""
    data = {name: value for name, value in {**MIXTRAL, **changes}.items() if value is not ...}
    path = folder / "Mixtral-8x7B" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(data))
    return str(path)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-w1", 2.2),
        ("mixtral-w2", 4.3),
        ("mixtral-d1", 2.1),
        ("mixtral-d2", 1.2),
        ("mixtral-d3", 3.5),
    ],
)
def test_named_sizes_have_the_papers_parameter_counts(name: str, billions: float) -> None:
    # The paper's figures count the vocabulary's matrix once; with our untied head d2 is 5.9 % above its 1.2 billion.
    model = load_model(name)
    once = model.parameters - model.vocab_size * model.hidden_size
    assert once == pytest.approx(billions * 1e9, rel=0.05)


def test_mixtral_8x7b_has_its_published_parameter_count() -> None:
    assert load_model("mixtral-8x7b").parameters == 46_702_792_704


def test_qwen3_235b_has_its_published_parameter_count() -> None:
    model = load_model("qwen3-235b")
    assert model.parameters == 235_093_634_560
    assert load_model("qwen3-30b-a3b").parameters == 30_532_122_624
    assert model.dense_parameters == pytest.approx(8.0e9, rel=0.01)


def test_deepseek_v3_has_its_published_parameter_count() -> None:
    model = load_model("deepseek-v3")
    gate_biases = 58 * 256  # state in ours, not parameters
    assert model.parameters + gate_biases == 671_026_419_200
    assert (model.layers, model.dense_layers) == (58, 3)
    assert model.dense_parameters == pytest.approx(17.1e9, rel=0.01)


@pytest.mark.parametrize(
    ("field", "most"), [("layers", MOST_LAYERS), ("experts", MOST_EXPERTS), ("dense_layers", MOST_LAYERS)]
)
def test_models_that_no_plan_can_list_are_refused(field: str, most: int) -> None:
    more = {"dense_ffn_size": 8} if field == "dense_layers" else {}
    ModelConfig.model_validate({**make_model().model_dump(), **more, field: most})
    with pytest.raises(ValidationError, match=f"less than or equal to {most}"):
        ModelConfig.model_validate({**make_model().model_dump(), **more, field: most + 1})


def test_dense_layers_count_every_matrix_once() -> None:
    model = make_model(layers=3, dense_layers=2, dense_ffn_size=96)
    attention = 2 * 64 * (64 + 32)
    assert model.dense_layer_parameters == attention + 3 * 64 * 96 + 2 * 64
    assert model.parameters == make_model(layers=3).parameters + 2 * model.dense_layer_parameters
    assert model.first_stage_parameters == 2 * model.dense_layer_parameters + model.attention_layer_parameters


def test_latent_attention_and_shared_experts_count_every_matrix_once() -> None:
    model = make_model(layers=3, kv_heads=4, latent=LatentAttention(**LATENT), shared_experts=2)
    down = 64 * 24 + 64 * (20 + 6) + 24 + 20  # both latents and the shared key; their norms
    up = 24 * 4 * (10 + 6) + 20 * 4 * (10 + 12) + 4 * 12 * 64  # queries, keys and values, out
    shared = 2 * 3 * 64 * 224
    assert model.attention_layer_parameters == down + up + shared + 64 * 4 + 2 * 64  # gate, two norms
    assert model.dense_parameters == 3 * model.attention_layer_parameters + 2 * 256 * 64 + 64


def test_files_and_hashes_from_before_these_fields_stay_valid() -> None:
    model = load_model("tiny")
    later = {"shared_experts", "latent", "rope_scaling", "dense_layers", "dense_ffn_size"}
    for spec in (model, model.shape):
        assert not later & spec.model_dump(mode="json").keys()
    assert sha256(model) == "d90d0ff2a88f1ea0f93df4dc8c19ffea40edfa4546194f7d9cd8c1f5b56455ed"  # in users' plans
    assert LayerShape.model_validate(model.shape.model_dump()) == model.shape


def test_shape_tells_kernels_of_different_speed_apart() -> None:
    model, latent = load_model("deepseek-v3"), load_model("deepseek-v3").latent
    assert latent is not None
    narrow = latent.model_copy(update={"query_rank": 8})
    others = {"shared_experts": 0}, {"latent": None}, {"dense_ffn_size": 9216}, {"latent": narrow}
    shapes = {model.shape, *(model.model_copy(update=other).shape for other in others)}
    assert len(shapes) == len({shape.label() for shape in shapes}) == 5


def test_router_fields_are_in_files_only_where_they_are_set() -> None:
    router = {"router_score": "sigmoid", "router_renormalise": False, "router_scale": 2.5, "router_z_loss": 1e-3}
    router["router_capacity"] = 1.25
    model = make_model(**router)
    data = model.model_dump(mode="json")
    assert {name: value for name, value in data.items() if name in ROUTER_FIELDS} == router
    assert ModelConfig.model_validate(data) == model
    assert not set(ROUTER_FIELDS) & make_model().model_dump().keys()
    assert model.shape == make_model().shape  # no plan and no profile depends on them


def test_named_sizes_have_the_papers_shapes() -> None:
    shapes = {name: (m.layers, m.hidden_size, m.experts, m.top_k) for name, m in NAMED_MODELS.items()}
    assert shapes["mixtral-w1"] == (4, 2048, 12, 2)
    assert shapes["mixtral-w2"] == (4, 2048, 24, 2)
    assert shapes["mixtral-d1"] == (8, 1024, 24, 2)
    assert shapes["mixtral-d2"] == (6, 1024, 18, 2)
    assert shapes["mixtral-d3"] == (8, 1024, 40, 2)


def test_parameters_count_every_matrix_once() -> None:
    model = make_model(layers=3, experts=5)
    attention = 64 * 64 + 64 * 32 * 2 + 64 * 64  # q, k and v, o
    layer = attention + 64 * 5 + 2 * 64 + 5 * 3 * 64 * 224  # gate, two norms, experts
    assert model.parameters == 3 * layer + 2 * 256 * 64 + 64  # embedding, head, final norm


def test_hugging_face_config_of_transformers_5(tmp_path: Path) -> None:
    model = load_model(config_file(tmp_path))
    assert model.rope_theta == 500000.0
    assert model.head_size == 128
    assert model.name == "Mixtral-8x7B"
    assert model.model_copy(update={"name": "mixtral-8x7b", "rope_theta": 1e6}) == NAMED_MODELS["mixtral-8x7b"]


def test_hugging_face_config_of_transformers_4(tmp_path: Path) -> None:
    model = load_model(config_file(tmp_path, rope_parameters=..., rope_theta=250000.0, head_dim=64))
    assert (model.rope_theta, model.head_size) == (250000.0, 64)


def test_hugging_face_rope_scaling(tmp_path: Path) -> None:
    model = load_model(config_file(tmp_path, rope_parameters={**YARN, "rope_theta": 2e6, "attention_factor": None}))
    assert model.rope_scaling == YarnScaling.model_validate(YARN)
    assert model.rope_theta == 2e6


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ({"type": "linear", "factor": 2}, LinearScaling(factor=2)),
        ({"type": "yarn", "factor": 8}, YarnScaling(factor=8, original_max_position_embeddings=32768)),
        ({"rope_type": "default"}, None),
    ],
)
def test_hugging_face_rope_scaling_of_transformers_4(tmp_path: Path, old: dict[str, Any], expected: object) -> None:
    changes = {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": old, "max_position_embeddings": 32768}
    model = load_model(config_file(tmp_path, **changes))
    assert (model.rope_scaling, model.rope_theta) == (expected, 5e5)


def test_hugging_face_default_of_rope_theta(tmp_path: Path) -> None:
    assert load_model(config_file(tmp_path, rope_parameters=...)).rope_theta == 1e6


def test_hugging_face_key_value_heads_of_null_are_the_attention_heads(tmp_path: Path) -> None:
    assert load_model(config_file(tmp_path, num_key_value_heads=None)).kv_heads == 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "field model_type: expected 'mixtral', 'qwen3_moe' or 'deepseek_v3', found 'llama'"),
        (
            {"model_type": ["mixtral"]},
            "field model_type: expected 'mixtral', 'qwen3_moe' or 'deepseek_v3', found ['mixtral']",
        ),
        ({"rope_parameters": ..., "rope_scaling": "linear"}, "field rope_scaling: expected an object with a rope_type"),
        ({"rope_parameters": [1]}, "field rope_parameters: expected an object with a rope_type, or null, found [1]"),
        ({"num_key_value_heads": ...}, "field kv_heads: Field required"),
        ({"hidden_act": "gelu"}, "field hidden_act: the value 'gelu' is not supported"),
        ({"sliding_window": 4096}, "field sliding_window: the value 4096 is not supported"),
        ({"attention_bias": True}, "field attention_bias: the value True is not supported"),
        ({"tie_word_embeddings": True}, "field tie_word_embeddings: the value True is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "field rope_scaling: Input tag 'longrope' found"),
        ({"rope_parameters": {"rope_type": "linear"}}, "field rope_scaling.linear.factor: Field required"),
        ({"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "field rope_scaling.yarn.partial_rotary_factor"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2}}, "Input tag 'dynamic' found"),
        ({"num_local_experts": ...}, "field experts: Field required"),
        ({"num_attention_heads": 0}, "field attention_heads: Input should be greater than 0"),
        ({"num_key_value_heads": 5}, "attention_heads 32 is not a multiple of kv_heads 5"),
    ],
)
def test_hugging_face_refusals(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = config_file(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


def refused(path: str, words: str) -> None:
    """The file is named, and what is wrong with it."""
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


def qwen_file(folder: Path, **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({name: value for name, value in {**QWEN, **changes}.items() if value is not ...}))
    return str(path)


def test_hugging_face_config_of_qwen3_moe(tmp_path: Path) -> None:
    named = NAMED_MODELS["qwen3-30b-a3b"]
    assert load_model(qwen_file(tmp_path)).model_copy(update={"name": named.name}) == named
    assert not load_model(qwen_file(tmp_path, norm_topk_prob=...)).router_renormalise  # transformers' default
    assert load_model(qwen_file(tmp_path, sliding_window=4096)).layers == 48  # it is not in use
    assert load_model(qwen_file(tmp_path, num_experts=..., num_local_experts=64)).experts == 64  # transformers 5's
    dense = load_model(qwen_file(tmp_path, mlp_only_layers=[0, 1]))
    assert (dense.layers, dense.dense_layers, dense.dense_ffn_size) == (46, 2, 6144)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mlp_only_layers": [3]}, "field mlp_only_layers: expected the first layers only, such as [0, 1], found [3]"),
        ({"mlp_only_layers": 3}, "field mlp_only_layers: expected the first layers only"),
        ({"mlp_only_layers": list(range(48))}, "field mlp_only_layers: expected 0 to 47 dense layers of 48"),
        ({"decoder_sparse_step": 2}, "field decoder_sparse_step: the value 2 is not supported"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "field sliding_window: the value 4096"),
        ({"num_experts": ...}, "experts"),
    ],
)
def test_hugging_face_refusals_of_qwen3_moe(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    refused(qwen_file(tmp_path, **changes), words)


def test_norms_of_heads_and_of_latents_exclude_each_other() -> None:
    with pytest.raises(UserError, match="qk_norm goes with GQA"):
        parse(ModelConfig, NAMED_MODELS["deepseek-v3"].model_dump() | {"qk_norm": True}, "model.yaml")


def deepseek_file(folder: Path, **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({name: value for name, value in {**DEEPSEEK, **changes}.items() if value is not ...}))
    return str(path)


def test_hugging_face_config_of_deepseek_v3(tmp_path: Path) -> None:
    model, named = load_model(deepseek_file(tmp_path)), NAMED_MODELS["deepseek-v3"]
    assert isinstance(model.rope_scaling, YarnScaling)
    training = ("router_balance", "router_bias_rate", "router_auxiliary_loss")  # not in the file
    same = {name: getattr(named, name) for name in ("name", "rope_scaling", *training)}
    assert model.model_copy(update=same) == named


def test_hugging_face_deepseek_without_dense_layers(tmp_path: Path) -> None:
    model = load_model(deepseek_file(tmp_path, first_k_dense_replace=0))
    assert (model.layers, model.dense_layers, model.dense_ffn_size) == (61, 0, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"first_k_dense_replace": 61}, "field first_k_dense_replace: expected 0 to 60 dense layers of 61, so"),
        ({"first_k_dense_replace": "3"}, "field first_k_dense_replace: expected 0 to 60 dense layers of 61, so"),
        ({"intermediate_size": ...}, "dense_layers 3 needs a dense_ffn_size above 0"),
        ({"q_lora_rank": None}, "field latent.query_rank: Field required"),
        ({"moe_layer_freq": 2}, "field moe_layer_freq: the value 2 is not supported"),
    ],
)
def test_hugging_face_refusals_of_deepseek_v3(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    refused(deepseek_file(tmp_path, **changes), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{\n 'a': 1}", "line 2: malformed JSON"),
        ("[]", "or 'deepseek_v3', found 'list'"),
        (100_000 * "[", "maximum recursion depth exceeded"),
        (5_000 * "9", "Exceeds the limit"),
    ],
)
def test_json_that_is_no_config(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_model(str(path))


@pytest.mark.parametrize("model", [make_model(layers=7), make_model(rope_scaling=YARN), NAMED_MODELS["deepseek-v3"]])
def test_yaml_model_round_trip(tmp_path: Path, model: ModelConfig) -> None:
    dump(model, tmp_path / "model.yaml")
    assert load_model(str(tmp_path / "model.yaml")) == model


def test_neither_file_nor_name_lists_the_names() -> None:
    with pytest.raises(UserError, match=r"'mixtral-w9': neither a file nor a named size \(mixtral-w1, "):
        load_model("mixtral-w9")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 5}, "top_k 5 is larger than experts 4"),
        ({"kv_heads": 3}, "attention_heads 4 is not a multiple of kv_heads 3"),
        ({"head_size": 15}, "head_size 15 must be even for RoPE"),
        ({"layers": 0}, "greater than 0"),
        ({"dense_layers": 1}, "dense_layers 1 needs a dense_ffn_size above 0"),
        ({"dense_ffn_size": 96}, "dense_ffn_size 96 needs dense_layers above 0"),
        ({"shared_experts": -1}, "greater than or equal to 0"),
        ({"latent": {**LATENT, "value_size": 0}}, "greater than 0"),
        ({"latent": {**LATENT, "width": 8}}, "Extra inputs are not permitted"),
        ({"latent": LATENT}, "kv_heads 2 must be attention_heads 4 with latent attention"),
        ({"latent": LATENT, "kv_heads": 4, "head_size": 18}, r"head_size 18 must be latent.nope_size .*, 10 \+ 6"),
        ({"latent": {**LATENT, "nope_size": 9, "rope_size": 7}, "kv_heads": 4}, "rope_size 7 must be even"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "greater than or equal to 1"),
        ({"rope_scaling": {**YARN, "beta_slow": 16.0}}, "beta_fast 16.0 must be above beta_slow 16.0"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 5.0}}, "high_freq_factor 4.0 must be above low_freq_factor 5"),
        ({"rope_scaling": {**LLAMA3, "beta_fast": 5.0}}, "Extra inputs are not permitted"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta 1.0 must be above 1 with rope_scaling"),
        ({"router_score": "tanh"}, "'softmax' or 'sigmoid'"),
        ({"router_scale": 0}, "greater than 0"),
        ({"router_capacity": 0}, "greater than 0"),
        ({"router_balance": "auxiliary"}, "needs a router_auxiliary_loss above 0"),
        ({"router_balance": "bias"}, "needs a router_bias_rate above 0"),
        ({"router_auxiliary_loss": 0.1}, "router_auxiliary_loss 0.1 needs router_balance auxiliary or bias"),
        (
            {"router_balance": "auxiliary", "router_auxiliary_loss": 0.1, "router_bias_rate": 0.1},
            "router_bias_rate 0.1",
        ),
    ],
)
def test_impossible_models_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        make_model(**changes)
