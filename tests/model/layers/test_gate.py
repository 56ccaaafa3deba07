"""The gate: scores, weights, losses by hand, the bias that balances, and its precision."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from builders import make_model
from hetermoe_cli.errors import UserError
from hetermoe_cli.model.layers.attention import AttentionBlock
from hetermoe_cli.model.layers.gate import Choice, Gate, balance_loss, beyond, wide_linear
from hetermoe_cli.model.optimizer import make_optimizer
from hetermoe_cli.model.transformer import Transformer, named_state
from hetermoe_cli.model.weights.training_state import restore_training, training_shapes, training_tensors
from hetermoe_cli.spec.train import TrainSpec

torch.set_num_threads(1)
BIAS = {"router_balance": "bias", "router_bias_rate": 0.01}


def make(dtype: torch.dtype = torch.float64, **router: Any) -> Gate:
    gate = Gate(make_model(hidden_size=8, **{"experts": 6, "top_k": 3, **router})).to(dtype)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(1)))
    return gate


def rows(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randn(batch, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# --- scores and weights ---


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_weights_are_the_chosen_scores(score: str, renormalise: bool, scale: float) -> None:
    gate, x = make(router_score=score, router_renormalise=renormalise, router_scale=scale), rows()
    logits = functional.linear(x, gate.weight).flatten(0, 1)
    scores = logits.softmax(-1) if score == "softmax" else 1 / (1 + (-logits).exp())
    choice = gate(x)
    best, experts = scores.topk(3)
    torch.testing.assert_close(choice.experts, experts)
    expected = scale * (best / best.sum(-1, keepdim=True) if renormalise else best)
    torch.testing.assert_close(choice.weights, expected, rtol=1e-14, atol=0)
    assert choice.losses is None


def test_sigmoid_scores_that_underflow_give_no_nan() -> None:
    gate, x = make(router_score="sigmoid", router_auxiliary_loss=0.1, router_balance="auxiliary"), rows()
    with torch.no_grad():
        gate.weight.copy_(-1e4 * x[0, 0])
    choice = gate(x[:1, :1].clone().requires_grad_())
    assert choice.losses is not None
    (choice.weights.sum() + choice.losses.sum()).backward()
    assert torch.isfinite(choice.weights).all()
    assert torch.isfinite(gate.weight.grad).all()  # type: ignore[arg-type]


# --- losses ---


def test_balance_loss_by_hand() -> None:
    """Two sequences of two tokens, three experts, top-1. f = rows of an expert / (2 / 3), P = mean probability."""
    probabilities = torch.tensor(
        [[[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], [[0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]], dtype=torch.float64
    )
    experts = torch.tensor([[[0], [0]], [[0], [1]]])
    first = 3.0 * 0.6  # all rows to expert 0: f = 3, P = 0.6
    second = 1.5 * 0.35 + 1.5 * 0.55  # experts 0 and 1 get one row each
    assert balance_loss(probabilities, experts).item() == pytest.approx(2 * (first + second), abs=1e-15)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_by_hand(score: str) -> None:
    fields = {"router_balance": "auxiliary", "router_auxiliary_loss": 0.3, "router_z_loss": 0.02}
    gate, x = make(router_score=score, **fields), rows()
    logits = x @ gate.weight.detach().T
    auxiliary = 0.0
    for sequence, chosen in zip(logits, gate(x).experts.view(3, 5, 3), strict=True):
        raw = sequence.exp() if score == "softmax" else sequence.sigmoid()
        mean = (raw / raw.sum(-1, keepdim=True)).mean(0)
        for expert in range(6):
            share = (chosen == expert).sum().item() * 6 / (3 * 5)
            auxiliary += 5 * share * mean[expert].item()
    z = sum(float(token.exp().sum().log()) ** 2 for token in logits.flatten(0, 1))
    losses = gate(x).losses
    assert losses.tolist() == pytest.approx([0.3 * auxiliary, 0.02 * z], rel=1e-13)


def test_losses_do_not_depend_on_how_a_batch_is_cut() -> None:
    gate = make(router_balance="auxiliary", router_auxiliary_loss=0.3, router_z_loss=0.02)
    x = rows(4)
    parts = [gate(part).losses for part in (x[:1], x[1:])]
    torch.testing.assert_close(gate(x).losses, parts[0] + parts[1], rtol=1e-14, atol=0)


def test_losses_pass_gradcheck() -> None:
    gate = make(router_score="sigmoid", router_balance="auxiliary", router_auxiliary_loss=0.3, router_z_loss=0.02)
    weight = gate.weight.detach().clone().requires_grad_()

    def losses(x: Tensor, w: Tensor) -> Tensor:
        choice: Choice = torch.func.functional_call(gate, {"weight": w}, (x,))
        assert choice.losses is not None
        return choice.losses

    assert torch.autograd.gradcheck(losses, (rows(2, 3).requires_grad_(), weight))


# --- capacity ---


def test_capacity_keeps_the_first_rows_of_each_sequence() -> None:
    """Three experts, two sequences of four tokens, top-2: at most three rows an expert and sequence."""
    experts = torch.tensor([[[0, 1], [0, 2], [0, 1], [1, 0]], [[2, 1], [1, 0], [2, 1], [1, 2]]])
    late = [[[0, 0], [0, 0], [0, 0], [0, 1]], [[0, 0], [0, 0], [0, 0], [1, 0]]]
    assert beyond(experts, 3, 3).tolist() == torch.tensor(late, dtype=torch.bool).tolist()


@pytest.mark.parametrize("capacity", [0.1, 0.8, 1.25, 6.0])
def test_dropped_choices_have_no_weight_and_the_others_keep_theirs(capacity: float) -> None:
    gate, free, x = make(router_capacity=capacity), make(), rows(4, 20)
    choice, before = gate(x), free(x)
    limit = math.ceil(capacity * 20 * 3 / 6)
    expected, seen = before.experts.clone(), torch.zeros(4, 6, dtype=torch.int64)
    for slot, expert in enumerate(before.experts.flatten().tolist()):
        sequence = slot // 60
        seen[sequence, expert] += 1
        if seen[sequence, expert] > limit:
            expected.view(-1)[slot] = 6
    assert torch.equal(choice.experts, expected)
    dropped = expected == 6
    assert dropped.any() == (capacity < 6)
    assert torch.equal(choice.weights, before.weights * ~dropped)


def test_capacity_does_not_depend_on_how_a_batch_is_cut_and_sees_no_later_token() -> None:
    gate, x = make(router_capacity=0.7), rows(4, 20)
    whole = gate(x).experts.view(4, 20, 3)
    assert torch.equal(whole, torch.cat([gate(part).experts.view(-1, 20, 3) for part in (x[:1], x[1:])]))
    changed = x.clone()
    changed[:, 13:] = -changed[:, 13:]
    assert torch.equal(gate(changed).experts.view(4, 20, 3)[:, :13], whole[:, :13])


def test_losses_count_dropped_choices() -> None:
    fields = {"router_balance": "auxiliary", "router_auxiliary_loss": 0.3}
    assert torch.equal(make(**fields)(rows()).losses, make(**fields, router_capacity=0.1)(rows()).losses)


# --- bias ---


def test_bias_decides_the_choice_and_not_the_weights() -> None:
    gate, x = make(router_score="sigmoid", router_renormalise=False, **BIAS), rows()
    assert gate.selection_bias is not None
    gate.selection_bias[4] = 10.0
    choice = gate(x)
    scores = functional.linear(x, gate.weight).sigmoid().flatten(0, 1)
    assert (choice.experts == 4).any(dim=1).all()
    torch.testing.assert_close(choice.weights, scores.gather(1, choice.experts), rtol=1e-14, atol=0)


def test_bias_moves_against_the_load_by_its_rate() -> None:
    gate = make(**BIAS)
    gate.update_bias(torch.tensor([3.0, 9, 6, 6, 0, 12], dtype=torch.float64))
    assert gate.selection_bias is not None
    torch.testing.assert_close(gate.selection_bias, 0.01 * torch.tensor([1.0, -1, 0, 0, 1, -1]))
    gate.update_bias(torch.tensor([6.0, 9, 6, 3, 6, 6], dtype=torch.float64))
    torch.testing.assert_close(gate.selection_bias, 0.01 * torch.tensor([1.0, -2, 0, 1, 1, -1]))


def test_bias_levels_a_skewed_load() -> None:
    gate, x = make(router_score="sigmoid", **BIAS), rows(8, 40)
    x[..., 0] = 1.0
    with torch.no_grad():
        gate.weight[:, 0] = torch.tensor([3.0, 1, 0, 0, 0, -3])

    def load() -> Tensor:
        return gate(x).experts.flatten().bincount(minlength=6).double()

    before = load().max() / load().mean()
    for _ in range(200):
        gate.update_bias(load())
    assert before > 1.5
    assert load().max() / load().mean() < 1.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bias_keeps_its_precision(dtype: torch.dtype) -> None:
    gate = make(torch.float32, **BIAS)
    assert gate.selection_bias is not None
    gate.selection_bias.fill_(1.001)  # not a number of bf16 or fp16
    gate.to(dtype)
    assert gate.weight.dtype == dtype
    assert gate.selection_bias.dtype == torch.float32
    assert (gate.selection_bias == torch.tensor(1.001)).all()
    assert gate.to("meta").selection_bias.device.type == "meta"


# --- precision ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_are_scored_in_fp32(dtype: torch.dtype) -> None:
    """Logits, choice and gradients are those of an fp32 gate on the same rounded inputs; only weights are rounded."""
    fields = {"router_balance": "auxiliary", "router_auxiliary_loss": 0.3, "router_z_loss": 0.02}
    narrow, x = make(dtype, **fields), rows().to(dtype).requires_grad_()
    wide, y = make(torch.float32, **fields), rows().to(dtype).float().requires_grad_()
    with torch.no_grad():
        wide.weight.copy_(narrow.weight)
    found, expected = narrow(x), wide(y)
    assert found.weights.dtype == dtype
    assert torch.equal(found.experts, expected.experts)
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.weights, expected.weights.to(dtype))
    for choice in (found, expected):
        (choice.losses.sum() + choice.weights[:, 0].float().sum()).backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad.to(dtype))
    assert narrow.weight.grad is not None
    torch.testing.assert_close(narrow.weight.grad, wide.weight.grad.to(dtype))  # type: ignore[union-attr]


def test_scoring_keeps_no_wide_copy_of_narrow_rows() -> None:
    kept: list[Tensor] = []
    x, weight = rows().bfloat16().requires_grad_(), torch.randn(6, 8).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert wide_linear(x, weight).dtype == torch.float32
    assert {t.dtype for t in kept} == {torch.bfloat16}


# --- shared experts ---


def test_shared_experts_add_to_the_residual_what_each_alone_would() -> None:
    config = make_model(hidden_size=16, ffn_size=12, head_size=4, shared_experts=2)
    block = AttentionBlock(config).double()
    assert block.shared is not None
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    routed = block(x)
    gate, up = block.shared.gate_up.weight.view(2, 2, 12, 16)  # [gate or up, expert, F, H]
    down = block.shared.down.weight.view(16, 2, 12)
    expected = x + block._attend(block.attention_norm(x))
    normed = block.expert_norm(expected)
    for expert in range(2):
        inner = functional.silu(normed @ gate[expert].T) * (normed @ up[expert].T)
        expected = expected + inner @ down[:, expert].T
    torch.testing.assert_close(routed.hidden, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(routed.rows, normed.flatten(0, 1))
    assert sum(p.numel() for p in block.parameters()) == config.attention_layer_parameters


# --- state ---


def test_bias_is_in_a_checkpoint_by_name_without_moments() -> None:
    config = make_model(layers=2, hidden_size=16, ffn_size=8, head_size=4, **BIAS)
    train = TrainSpec(sequence_length=8, global_batch_sequences=2)
    model, again = Transformer(config), Transformer(config)
    model.dense.update_biases(torch.tensor([[1.0, 2, 3, 6], [5, 4, 2, 1]], dtype=torch.float64))
    tensors = training_tensors(model, make_optimizer(model, train))
    names = {f"layers.{layer}.gate.selection_bias" for layer in range(2)}
    assert {name for name in tensors if "bias" in name} == names
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == training_shapes(config)
    optimizer = make_optimizer(again, train)
    restore_training(again, optimizer, tensors, 1)
    assert all(torch.equal(named_state(again)[name], tensors[name]) for name in names)
    with pytest.raises(UserError, match=r"'layers.1.gate.selection_bias' is missing"):
        restore_training(again, optimizer, {n: t for n, t in tensors.items() if "1.gate.selection" not in n}, 1)
