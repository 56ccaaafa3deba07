"""Latent attention: DeepSeek's formula head by head, in every precision, inside documents, and what it keeps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from builders import make_model
from finite_differences import check_gradients
from hetermoe_cli.model.kernels.causal import attend
from hetermoe_cli.model.kernels.documents import find_documents
from hetermoe_cli.model.layers.attention import AttentionBlock
from hetermoe_cli.model.layers.latent import LatentProjections, softmax_scale
from hetermoe_cli.model.transformer import Transformer, initialise, named_tensors
from hetermoe_cli.profiler.measure import Case, saved_bytes
from hetermoe_cli.spec.model import ModelConfig

torch.set_num_threads(1)
END, LENGTH = 0, 12
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4, "beta_fast": 2.0, "beta_slow": 0.1}
MSCALE = {"mscale": 1.0, "mscale_all_dim": 0.5}


def make_config(**other: Any) -> ModelConfig:
    latent = {"query_rank": 9, "key_value_rank": 7, "nope_size": 2, "rope_size": 4, "value_size": 3}
    sizes = {"hidden_size": 16, "ffn_size": 12, "attention_heads": 4, "kv_heads": 4, "head_size": 6}
    fields = {"latent": latent, "initializer_range": 0.3, **sizes, **other}
    return ModelConfig.model_validate(make_model(layers=2).model_dump() | fields)


def make(config: ModelConfig, document_end: int | None = None) -> Transformer:
    model = Transformer(config, document_end=document_end).double()
    initialise(model, config, seed=0)
    return model


def text(sequences: int = 2) -> tuple[Tensor, Tensor]:
    window = torch.randint(1, 256, (sequences, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return window[:, :-1], window[:, 1:]


def turned(x: Tensor, config: ModelConfig, factor: float = 1.0) -> Tensor:
    """RoPE on x [S, 4] as complex numbers: dimensions i and i + 2 make one, turned by position * theta^(-i / 2)."""
    steps = torch.tensor([1.0, config.rope_theta**-0.5], dtype=torch.float64)
    angle = torch.outer(torch.arange(len(x), dtype=torch.float64), steps)
    result = torch.complex(x[:, :2], x[:, 2:]) * torch.polar(torch.full_like(angle, factor), angle)
    return torch.cat([result.real, result.imag], dim=-1)


def test_a_head_attends_as_deepseek_s_formula_says() -> None:
    config = make_config()
    block = make(config).dense.layers[0]
    assert isinstance(block, AttentionBlock)
    parts = block.latent
    assert isinstance(parts, LatentProjections)
    x = torch.randn(1, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        parts.query_norm.weight.copy_(torch.linspace(0.5, 2, 9))
        parts.key_value_norm.weight.copy_(torch.linspace(2, 0.5, 7))

    def normed(latent: Tensor, weight: Tensor) -> Tensor:
        return latent / (latent.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight

    query_latent = normed(x[0] @ parts.query_down.weight.T, parts.query_norm.weight)
    down = x[0] @ parts.key_value_down.weight.T
    latent, shared = normed(down[:, :7], parts.key_value_norm.weight), turned(down[:, 7:], config)
    mask, heads = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1), []
    for head in range(4):
        query = query_latent @ parts.query_up.weight[6 * head : 6 * head + 6].T
        key_value = latent @ parts.key_value_up.weight[5 * head : 5 * head + 5].T
        scores = query[:, :2] @ key_value[:, :2].T + turned(query[:, 2:], config) @ shared.T
        heads.append((scores / math.sqrt(6) + mask).softmax(dim=-1) @ key_value[:, 2:])
    torch.testing.assert_close(block._attend(x)[0], block.out(torch.cat(heads, dim=-1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        (None, 1.0),
        ({"rope_type": "linear", "factor": 40.0}, 1.0),
        (YARN, 1.0),
        (YARN | MSCALE, (0.05 * math.log(40) + 1) ** 2),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}, 1.0),
    ],
)
def test_yarn_s_magnitude_scales_scores_where_deepseek_s_does(scaling: dict[str, Any] | None, factor: float) -> None:
    config = make_config(rope_scaling=scaling)
    assert softmax_scale(config) == pytest.approx(factor / math.sqrt(6), rel=1e-14)
    block, plain = make(config).dense.layers[0], make_config(rope_scaling=scaling, latent=None)
    assert isinstance(block, AttentionBlock)
    assert block.scale == softmax_scale(config)
    assert AttentionBlock(plain).scale is None


def test_names_and_parameters_are_those_of_the_spec() -> None:
    config = make_config(dense_layers=1, dense_ffn_size=20)
    model = make(config)
    names = {name for name in named_tensors(model) if name.startswith("dense_layers.0")}
    latent = ("query_down", "query_norm", "query_up", "key_value_down", "key_value_norm", "key_value_up")
    parts = (*(f"latent.{part}" for part in latent), "attention_norm", "out", "ffn_norm", "ffn.gate_up", "ffn.down")
    assert names == {f"dense_layers.0.{part}.weight" for part in parts}
    assert sum(parameter.numel() for parameter in model.parameters()) == config.parameters


def test_gradients_match_finite_differences() -> None:
    check_gradients(make(make_config(rope_scaling=YARN | MSCALE)), *text(), lambda name: "latent" in name)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_narrow_precisions_are_near_float64(dtype: torch.dtype, error: float) -> None:
    config = make_config(rope_scaling=YARN | MSCALE)
    exact, x = make(config).dense.layers[0], torch.randn(2, LENGTH, 16, generator=torch.Generator().manual_seed(5))
    narrow = AttentionBlock(config)
    narrow.load_state_dict(exact.state_dict())
    assert isinstance(exact, AttentionBlock)
    found = narrow.to(dtype)._attend(x.to(dtype))
    assert found.dtype == dtype
    expected = exact._attend(x.to(dtype).double())
    assert (found.double() - expected).norm() < error * expected.norm()


def test_documents_attend_as_if_alone() -> None:
    config, lengths = make_config(rope_scaling=YARN | MSCALE), (3, 4, 5)
    masked, alone, (tokens, targets) = make(config, END), make(config), text(1)
    tokens[0, torch.tensor(lengths).cumsum(0) - 1] = END
    parts = zip(tokens.split(lengths, dim=1), targets.split(lengths, dim=1), strict=True)
    expected = sum(alone(document, follows).item() for document, follows in parts)
    assert masked(tokens, targets).item() == pytest.approx(expected, rel=1e-13)
    assert alone(tokens, targets).item() != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [3, 6, 8])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_values_may_have_a_width_of_their_own(value: int, packed: bool, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 2, 4, LENGTH, 6, dtype=torch.float64, generator=generator)
    values = torch.randn(2, 4, LENGTH, value, dtype=torch.float64, generator=generator)
    tokens, _ = text()
    tokens[:, 4] = END
    ends = (tokens == END).long()
    number = ends.cumsum(1) - ends
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    if packed:
        mask = mask & (number[:, :, None] == number[:, None, :])[:, None]
    found = attend(query, key, values, find_documents(tokens, END, query.device) if packed else None, scale)
    expected = functional.scaled_dot_product_attention(query, key, values, attn_mask=mask, scale=scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_no_score_is_kept_for_backward() -> None:
    """Memory grows with the tokens, not with their square."""
    block = AttentionBlock(make_config())

    def kept(length: int) -> int:
        case = Case("", lambda: [torch.randn(1, length, 16, requires_grad=True)], lambda x: [block._attend(x[0])])
        return saved_bytes(case, list(block.parameters()))

    assert kept(512) < 2.01 * kept(256)
