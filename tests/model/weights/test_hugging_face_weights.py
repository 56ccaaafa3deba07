"""Weights in Hugging Face's form: back and forth to the bit, the same logits in transformers, refusals."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from builders import make_model
from hetermoe_cli.errors import UserError
from hetermoe_cli.model.transformer import Transformer, initialise, named_state, named_tensors
from hetermoe_cli.model.weights import hugging_face
from hetermoe_cli.model.weights.checkpoint import Stored
from hetermoe_cli.model.weights.hugging_face import Weights, export
from hetermoe_cli.model.weights.training_state import weight_names
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.named_models import load_model

torch.set_num_threads(1)
ROUNDING = 6e-6  # of logits up to 3; up to 3.4e-6 was seen, by the processor
ROOT = Path(__file__).resolve().parents[3]
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "beta_fast": 2.0, "beta_slow": 0.1}
LATENT = {
    "kv_heads": 4, "head_size": 12, "shared_experts": 2, "router_score": "sigmoid",
    "latent": {"query_rank": 24, "key_value_rank": 20, "nope_size": 4, "rope_size": 8, "value_size": 6},
}  # fmt: skip
BIAS = {"router_balance": "bias", "router_bias_rate": 0.001, "router_scale": 2.5}
DENSE = {"dense_layers": 1, "dense_ffn_size": 40}
CASES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "mixtral, yarn": {"rope_scaling": YARN},
    "qwen": {"qk_norm": True},
    "qwen, dense layer, weights as they are": DENSE | {"qk_norm": True, "router_renormalise": False, "head_size": 12},
    "deepseek": LATENT | {"router_renormalise": False},
    "deepseek, dense layer, bias, yarn": LATENT | BIAS | DENSE | {
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}, "norm_epsilon": 1e-4,
    },
}  # fmt: skip


def make_config(name: str) -> ModelConfig:
    sizes = {"hidden_size": 32, "ffn_size": 24, "head_size": 8, "initializer_range": 0.1}
    return ModelConfig.model_validate(make_model().model_dump() | sizes | CASES[name])


def tensors_of(model: Transformer) -> dict[str, Tensor]:
    return named_tensors(model) | named_state(model)


def make(config: ModelConfig) -> Transformer:
    """No norm is all ones and no bias zero."""
    model = Transformer(config)
    initialise(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for tensor in tensors_of(model).values():
        if tensor.dim() == 1:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def exported(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Ours, after they are written."""
    tensors = tensors_of(make(config))
    export(folder, config, tensors, sequence_length=16)
    return tensors


@pytest.mark.parametrize("name", CASES)
def test_weights_come_back_to_the_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugging_face, "_LARGEST_FILE_BYTES", 20000)
    config = make_config(name)
    tensors = exported(tmp_path / "new", config)
    assert tensors.keys() == weight_names(config)
    assert len(list((tmp_path / "new").glob("model-*-of-*.safetensors"))) > 3
    found = Weights(tmp_path / "new", config).tensors(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    free = {name: getattr(config, name) for name in hugging_face._FREE}
    assert load_model(str(tmp_path / "new/config.json")).model_copy(update=free) == config


def mapped(folder: Path) -> int:
    """How often files of `folder` are mapped into this process."""
    return Path("/proc/self/maps").read_text().count(f" {folder}/")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("name", CASES)
def test_one_file_is_in_memory_and_no_shard_stays_mapped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor of a checkpoint maps its whole shard, so a large one would fill the address space."""
    config, seen, written = make_config(name), list[tuple[int, int]](), list[weakref.ref[Tensor]]()
    tensors = tensors_of(make(config))
    save_file(tensors, tmp_path / "shard.safetensors")
    stored = Stored(dict.fromkeys(tensors, tmp_path / "shard.safetensors"))
    assert [mapped(tmp_path) for _ in [stored["norm.weight"]]] == [1]

    def watched(group: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        seen.append((mapped(tmp_path), sum(tensor() is not None for tensor in written)))
        written.extend(map(weakref.ref, group.values()))
        save_file(group, path, metadata)

    monkeypatch.setattr(hugging_face, "_LARGEST_FILE_BYTES", 20000)
    monkeypatch.setattr(hugging_face, "save_file", watched)
    export(tmp_path / "new", config, stored, sequence_length=16)
    assert len(seen) > 3
    assert set(seen) == {(0, 0)}
    export(tmp_path / "of memory", config, tensors, sequence_length=16)
    for path in (tmp_path / "new").iterdir():
        assert path.read_bytes() == (tmp_path / "of memory" / path.name).read_bytes()


def test_rope_parts_are_interleaved_and_nothing_else(tmp_path: Path) -> None:
    config = make_config("deepseek")
    tensors, theirs = exported(tmp_path, config), load_file(tmp_path / "model.safetensors")
    queries, ours = theirs["model.layers.1.self_attn.q_b_proj.weight"], tensors["layers.1.latent.query_up.weight"]
    order = [0, 1, 2, 3, 4, 8, 5, 9, 6, 10, 7, 11]
    assert torch.equal(queries.view(4, 12, 24), ours.view(4, 12, 24)[:, order])
    down = theirs["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"]
    order = [*range(20), 20, 24, 21, 25, 22, 26, 23, 27]
    assert torch.equal(down, tensors["layers.1.latent.key_value_down.weight"][order])
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"rope_interleave": False}))
    (plain,) = Weights(tmp_path, config).tensors(["layers.1.latent.query_up.weight"]).values()
    assert torch.equal(plain, queries)


# --- what transformers computes ---

SCRIPT = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
folder, again, bias = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "bias"
tokens, result = load_file(folder / "tokens.st")["tokens"], {}
for attention in ("eager", "sdpa"):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    result[attention] = model(input_ids=tokens).logits.detach()
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
for name, tensor in model.state_dict().items():
    if bias or not name.endswith("bias"):
        tensor.add_(0.1 * torch.randn_like(tensor))
model.save_pretrained(again)
save_file({**result, "again": model.eval()(input_ids=tokens).logits.detach()}, folder / "logits.st")
"""


def python_with_transformers() -> str | None:
    """This one, or that of the rivals' environment (scripts/rivals_environment.py)."""
    rivals = ROOT / "build/rivals-venv/bin/python"
    return sys.executable if find_spec("transformers") else str(rivals) if rivals.exists() else None


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.dense.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(tokens, tokens)
    handle.remove()
    return model.dense.head(seen[0]).detach()  # type: ignore[no-any-return]


@pytest.mark.skipif(
    python_with_transformers() is None, reason="needs transformers: scripts/bench_rivals.py installs it"
)
@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    """Of weights that we wrote, and ours of weights that it wrote."""
    config = make_config(name)
    model = make(config)
    export(tmp_path, config, tensors_of(model), sequence_length=16)
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(3))
    save_file({"tokens": tokens}, tmp_path / "tokens.st")
    command = [
        str(python_with_transformers()),
        "-c",
        SCRIPT,
        str(tmp_path),
        str(tmp_path / "again"),
        config.router_balance,
    ]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    theirs, ours = load_file(tmp_path / "logits.st"), logits(model, tokens)
    assert ours.std() > 0.1
    for attention in ("eager", "sdpa"):
        torch.testing.assert_close(theirs[attention], ours, rtol=0, atol=ROUNDING)
    for tensor_name, tensor in Weights(tmp_path / "again", config).tensors(tensors_of(model)).items():
        tensors_of(model)[tensor_name].copy_(tensor)
    torch.testing.assert_close(logits(model, tokens), theirs["again"], rtol=0, atol=ROUNDING)


# --- what is refused ---


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"
GATE_BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"
REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (edit_tensors(lambda t: t.pop(EXPERT)), rf"tensor '{EXPERT}' is missing for model synthetic \(1 such\)"),
    (edit_tensors(lambda t: t.update({EXPERT: torch.ones(24, 32)})), rf"tensor '{EXPERT}' is of another shape"),
    (edit_tensors(lambda t: t.update(more=torch.ones(1))), "tensor 'more' is unknown"),
    (edit_tensors(lambda t: t.update({GATE_BIAS: torch.ones(4)})), rf"'{GATE_BIAS}' biases .* router_balance: bias"),
    (edit_config(n_group=2), r"config.json: field n_group: .* 2 groups"),
    (edit_config(quantization_config={"quant_method": "fp8"}), "field quantization_config"),
    (edit_config(v_head_dim=8), "field latent is .* plan for that model"),
    (edit_config(model_type="llama"), "field model_type"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), r"model.safetensors: .*: fetch it again"),
    (lambda folder: (folder / "model.safetensors").unlink(), r"model.safetensors: .*: fetch it again"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "field weight_map"),
]


@pytest.mark.parametrize(("damage", "problem"), REFUSED)
def test_weights_of_another_model_are_refused(damage: Callable[[Path], None], problem: str, tmp_path: Path) -> None:
    config = make_config("deepseek")
    exported(tmp_path, config)
    damage(tmp_path)
    with pytest.raises(UserError, match=problem):
        Weights(tmp_path, config)


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    config = make_config("deepseek")
    exported(tmp_path, config)
    edit_tensors(lambda t: t.update({"model.layers.2.eh_proj.weight": torch.ones(1)}))(tmp_path)
    Weights(tmp_path, config)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"router_scale": 2.0}, "router_scale: Hugging Face's mixtral"),
        ({"shared_experts": 1}, "shared_experts"),
        (LATENT | {"router_score": "softmax"}, "router_score: Hugging Face's deepseek_v3"),
        (LATENT | {"shared_experts": 0}, "shared_experts"),
        (LATENT | {"top_k": 1}, "top_k"),
    ],
)
def test_models_that_hugging_face_does_not_have_are_not_written(
    changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    config = ModelConfig.model_validate(make_config("mixtral").model_dump() | changes)
    with pytest.raises(UserError, match=f"model synthetic: field {field}"):
        export(tmp_path / "new", config, {}, 16)
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="exists already: name a new --output"):
        exported(tmp_path, make_config("mixtral"))
