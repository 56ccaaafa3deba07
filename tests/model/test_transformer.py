"""The reference model: causal, relative in position, exact gradients, and equal however its experts are split."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from builders import make_model
from finite_differences import check_gradients
from hetermoe_cli.model.kernels.rope import rope_table, rotate
from hetermoe_cli.model.layers.attention import AttentionBlock, DenseBlock
from hetermoe_cli.model.layers.moe import ExpertGroup
from hetermoe_cli.model.transformer import DenseModel, Transformer, initialise, named_tensors, parameter_slices
from hetermoe_cli.spec.model import ModelConfig

torch.set_num_threads(1)
LENGTH = 12
MODEL = make_model(layers=2, experts=4, hidden_size=16, ffn_size=12, attention_heads=4, kv_heads=2, head_size=4)


def make(seed: int = 0, scale: float = 1.0, config: ModelConfig = MODEL) -> Transformer:
    """A float64 model; `scale` > 1 makes the gate decisive and attention sharp."""
    model = Transformer(config).double()
    initialise(model, config, seed)
    with torch.no_grad():
        for tensor in named_tensors(model).values():
            if tensor.dim() > 1:
                tensor.mul_(scale)
    return model


def text(seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    window = torch.randint(0, 256, (batch, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return window[:, :-1], window[:, 1:]


def losses_by_position(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Loss of every position [S] of one sequence, by differences of prefixes' sums."""
    prefixes = [model(tokens[:, :length], targets[:, :length]) for length in range(1, LENGTH + 1)]
    return torch.stack(prefixes).diff(prepend=torch.zeros(1))


def record(layer: nn.Module) -> list[Tensor]:
    """Experts chosen at every later call of the layer."""
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _module, _inputs, routed: seen.append(routed.experts))
    return seen


# --- dense layers ---


def test_dense_layers_come_before_the_first_moe_layer() -> None:
    """Step by step: attention and a SwiGLU network, each behind its norm and added to the residual."""
    config = MODEL.model_copy(update={"dense_layers": 2, "dense_ffn_size": 20})
    model, (tokens, _) = make(scale=10, config=config), text(0)
    hidden = model.dense.embedding(tokens)
    for block in model.dense.dense_layers:
        assert isinstance(block, DenseBlock)
        hidden = hidden + block._attend(block.attention_norm(hidden))
        gate, up = functional.linear(block.ffn_norm(hidden), block.ffn.gate_up.weight).split(20, dim=-1)
        hidden = hidden + functional.linear(gate * gate.sigmoid() * up, block.ffn.down.weight)
    assert torch.allclose(model.dense.embed(tokens), hidden, rtol=0, atol=1e-12)
    seen: list[Tensor] = []
    model.dense.layers[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model(*text(0))
    assert torch.equal(seen[0], model.dense.embed(tokens))


def test_dense_layers_have_names_and_all_parameters_that_the_spec_counts() -> None:
    config = MODEL.model_copy(update={"dense_layers": 1, "dense_ffn_size": 20})
    model = make(config=config)
    new = named_tensors(model).keys() - named_tensors(make()).keys()
    parts = ("attention_norm", "qkv", "out", "ffn_norm", "ffn.gate_up", "ffn.down")
    assert new == {f"dense_layers.0.{part}.weight" for part in parts}
    assert sum(parameter.numel() for parameter in model.parameters()) == config.parameters


# --- gradients ---


@pytest.mark.parametrize("dense", [{}, {"dense_layers": 1, "dense_ffn_size": 20}])
def test_gradients_match_finite_differences(dense: dict[str, int]) -> None:
    """Central differences along a random direction of every parameter; the top-k choice is locally constant."""
    check_gradients(make(scale=10, config=MODEL.model_copy(update=dense)), *text(0))


def test_expert_rows_pass_gradcheck() -> None:
    group = ExpertGroup(MODEL, 0, [3, 1, 2]).double()
    initialise(group, MODEL.model_copy(update={"initializer_range": 0.3}), seed=1)
    rows = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    counts = [2, 0, 3]
    assert torch.autograd.gradcheck(
        lambda x, up, down: functional_group(group, x, up, down, counts), (rows, group.gate_up, group.down)
    )


def functional_group(group: ExpertGroup, rows: Tensor, gate_up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    parameters = {"gate_up": gate_up, "down": down}
    return torch.func.functional_call(group, parameters, (rows, counts))  # type: ignore[no-any-return]


def test_learned_gate_receives_gradient() -> None:
    model = make(scale=10)
    model(*text(0)).backward()
    for layer in model.dense.layers:
        assert layer.gate.weight.grad.norm() > 1e-6  # type: ignore[union-attr, operator]


def test_expert_without_tokens_changes_nothing_and_gets_zero_gradient() -> None:
    model, batch = make(scale=10, config=MODEL.model_copy(update={"experts": 5})), text(0)
    gate, group = named_tensors(model)["layers.0.gate.weight"], model.experts[0]
    gate[0] = 0  # the others score x, -x, y, -y: two of them are always above zero
    gate[2], gate[4] = -gate[1], -gate[3]
    seen = record(model.dense.layers[0])
    before = model(*batch)
    before.backward()
    assert not (seen[0] == 0).any()
    for expert in range(5):
        assert bool(group.gate_up.grad[expert].any()) == (expert != 0)  # type: ignore[index, union-attr]
    named_tensors(model)["layers.0.experts.0.down"] += 100
    assert model(*batch).item() == before.item()


# --- attention ---


@given(position=st.integers(1, LENGTH - 1), seed=st.integers(0, 20))
def test_a_later_token_never_changes_an_earlier_loss(position: int, seed: int) -> None:
    model, (tokens, targets) = make(scale=10), text(seed, batch=1)
    before = losses_by_position(model, tokens, targets)
    tokens = tokens.clone()
    tokens[0, position] = (tokens[0, position] + 1) % 256
    after = losses_by_position(model, tokens, targets)
    torch.testing.assert_close(after[:position], before[:position], rtol=0, atol=1e-12)
    assert abs(after[position] - before[position]) > 1e-9


def test_one_forward_equals_the_sum_over_prefixes() -> None:
    """A whole sequence at once sees no later token: position by position, the full pass equals its prefixes."""
    model, (tokens, targets) = make(scale=10), text(3, batch=1)

    def final(length: int) -> Tensor:
        captured: list[Tensor] = []
        handle = model.dense.norm.register_forward_hook(lambda _m, _i, out: captured.append(out[0]))
        model(tokens[:, :length], targets[:, :length])
        handle.remove()
        return captured[0]

    hidden = {length: final(length) for length in (1, 5, LENGTH)}
    torch.testing.assert_close(hidden[LENGTH][:5], hidden[5], rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden[LENGTH][:1], hidden[1], rtol=0, atol=1e-12)


@given(shift=st.integers(1, 40), query=st.integers(0, 20), key=st.integers(0, 20))
def test_rope_scores_depend_on_the_distance_only(shift: int, query: int, key: int) -> None:
    cos, sin = rope_table(80, 8, 10000.0, torch.device("cpu"), torch.float64)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=generator, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        return float(rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j]))

    assert score(query + shift, key + shift) == pytest.approx(score(query, key), abs=1e-12)
    assert score(query + shift, key) != pytest.approx(score(query, key), abs=1e-6)


def test_kv_heads_serve_neighbouring_query_heads() -> None:
    """GQA by hand: query heads 0, 1 read KV head 0 and heads 2, 3 KV head 1 (Hugging Face's order)."""
    block = AttentionBlock(MODEL).double()
    x = torch.randn(1, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    query, key, value = block.qkv(x)[0].split([16, 8, 8], dim=-1)
    cos, sin = rope_table(LENGTH, 4, MODEL.rope_theta, x.device, x.dtype)
    mask = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)
    heads = []
    for head in range(4):
        own, shared = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        scores = rotate(query[:, own], cos, sin) @ rotate(key[:, shared], cos, sin).T / 2
        heads.append((scores + mask).softmax(dim=-1) @ value[:, shared])
    torch.testing.assert_close(block._attend(x)[0], block.out(torch.cat(heads, dim=-1)), rtol=0, atol=1e-12)


# --- routing ---


def test_loss_equals_experts_applied_token_by_token() -> None:
    """Dense reference: every token through each of its experts, one at a time."""
    model, (tokens, targets) = make(scale=10), text(5)
    hidden = model.dense.embedding(tokens)
    for layer, group in enumerate(model.experts):
        routed = model.dense.stage(layer, hidden)
        outputs = torch.zeros(len(routed.rows), MODEL.top_k, 16, dtype=torch.float64)
        for token, row in enumerate(routed.rows):
            for choice, expert in enumerate(routed.experts[token].tolist()):
                gate, up = (group.gate_up[expert] @ row).chunk(2)  # type: ignore[index]
                outputs[token, choice] = group.down[expert] @ (functional.silu(gate) * up)  # type: ignore[index]
        hidden = routed.hidden + (outputs * routed.weights[..., None]).sum(dim=1).view_as(hidden)
    assert model(tokens, targets).item() == pytest.approx(model.dense.loss(hidden, targets).item(), abs=1e-10)


def test_gate_takes_the_best_experts_and_renormalises() -> None:
    block = make(scale=10).dense.layers[0]
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    routed = block(x)
    scores = functional.linear(routed.rows, block.gate.weight).softmax(dim=-1)  # type: ignore[union-attr, arg-type]
    chosen = scores.gather(1, routed.experts)
    others = scores.scatter(1, routed.experts, -1.0)
    assert (chosen.min(dim=1).values >= others.max(dim=1).values).all()
    torch.testing.assert_close(routed.weights, chosen / chosen.sum(dim=1, keepdim=True))


@pytest.mark.parametrize(("experts", "top_k", "length"), [(4, 2, 12), (6, 3, 8), (8, 1, 16)])
def test_balanced_router_loads_all_experts_equally(experts: int, top_k: int, length: int) -> None:
    config = MODEL.model_copy(update={"experts": experts, "top_k": top_k})
    routed = AttentionBlock(config, "balanced")(torch.randn(3, length, 16))
    assert routed.experts.flatten().bincount(minlength=experts).tolist() == [3 * length * top_k // experts] * experts
    assert all(len(set(row)) == top_k for row in routed.experts.tolist())
    assert routed.weights.requires_grad


def test_learned_router_does_not_load_them_equally() -> None:
    model = make(scale=10)
    seen = record(model.dense.layers[0])
    model(*text(0, batch=4))
    counts = seen[0].flatten().bincount(minlength=MODEL.experts)
    assert counts.max() > counts.float().mean() * 1.05


# --- names and initial weights ---


class Rank(nn.Module):
    """Parts of a model, in any split."""

    def __init__(self, dense: bool, splits: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.first = nn.ModuleList(ExpertGroup(MODEL, layer, ids) for ids in splits for layer in (1, 0))
        self.then = DenseModel(MODEL) if dense else None


@given(hosts=st.lists(st.integers(0, 2), min_size=4, max_size=4), order=st.permutations(range(4)))
def test_initial_weights_do_not_depend_on_the_split(hosts: list[int], order: list[int]) -> None:
    whole = Transformer(MODEL)
    initialise(whole, MODEL, seed=7)
    expected = named_tensors(whole)
    found: dict[str, Tensor] = {}
    for host in range(3):
        rank = Rank(host == 1, [[e for e in order if hosts[e] == host]])
        initialise(rank, MODEL, seed=7)
        assert not found.keys() & named_tensors(rank).keys()
        found |= named_tensors(rank)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_initial_weights_depend_on_seed_and_name() -> None:
    first, other = make(0), make(1)
    assert not torch.equal(named_tensors(first)["head.weight"], named_tensors(other)["head.weight"])
    experts = [tensor for name, tensor in named_tensors(first).items() if name.endswith("down")]
    assert len({tensor.sum().item() for tensor in experts}) == len(experts) == 8
    for name, tensor in named_tensors(first).items():
        if tensor.dim() == 1:
            assert (tensor == 1).all(), name
        else:
            assert tensor.std().item() == pytest.approx(MODEL.initializer_range, rel=0.3), name


def test_named_tensors_are_the_parameters_and_cover_them() -> None:
    model = make()
    assert sum(tensor.numel() for tensor in named_tensors(model).values()) == MODEL.parameters
    assert sum(p.numel() for p in model.parameters()) == MODEL.parameters
    named_tensors(model)["layers.1.experts.2.down"].fill_(5.0)
    assert (model.experts[1].down[2] == 5).all()  # type: ignore[index]
    parameter, index = parameter_slices(model)["layers.1.experts.2.down"]
    assert parameter is model.experts[1].down
    assert index == 2


def test_a_gate_with_one_choice_learns() -> None:
    model = make(config=MODEL.model_copy(update={"top_k": 1}), scale=5.0)
    model(*text(0)).backward()
    assert all(float(block.gate.weight.grad.abs().max()) > 1e-6 for block in model.dense.layers)
