"""The learning rate's shape, and which parameters AdamW decays."""

import pytest
import torch
from torch import nn

from hetermoe_cli.model.optimizer import learning_rate, make_optimizer
from hetermoe_cli.spec.train import TrainSpec


def spec(**fields: float) -> TrainSpec:
    defaults = {"steps": 30, "warmup_steps": 10, "learning_rate": 0.2, "minimum_learning_rate_ratio": 0.1}
    return TrainSpec.model_validate({"sequence_length": 8, "global_batch_sequences": 1, **defaults, **fields})


def test_warm_up_is_linear_then_a_cosine_falls_to_the_minimum() -> None:
    rates = [learning_rate(spec(), step) for step in range(31)]
    assert rates[:10] == pytest.approx([0.02 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(0.2)
    assert rates[20] == pytest.approx(0.11)  # half way between 0.2 and 0.02
    assert rates[30] == pytest.approx(0.02)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(spec(), 500) == pytest.approx(0.02)


@pytest.mark.parametrize(("warmup", "first", "last"), [(0, 0.2, 0.02), (30, 0.2 / 30, 0.2)])
def test_no_warm_up_and_nothing_but_warm_up(warmup: int, first: float, last: float) -> None:
    assert learning_rate(spec(warmup_steps=warmup), 0) == pytest.approx(first)
    assert learning_rate(spec(warmup_steps=warmup), 30) == pytest.approx(last)


def test_only_matrices_decay() -> None:
    parts = nn.ModuleDict({"matrix": nn.Linear(2, 2, bias=False), "norm": nn.RMSNorm(2)})
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(parts, spec(warmup_steps=0, weight_decay=0.5))
    optimizer.step()
    assert torch.equal(parts["norm"].weight, torch.ones(2))  # type: ignore[arg-type]
    torch.testing.assert_close(parts["matrix"].weight, torch.full((2, 2), 1 - 0.2 * 0.5))  # type: ignore[arg-type]


def test_a_step_follows_the_spec() -> None:
    """AdamW by hand: after one step the weight has moved by the rate, bias corrections cancelling beta1 and beta2."""
    parts = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    parameter = parts.weight
    before, parameter.grad = parameter.item(), torch.full_like(parameter, 3.0)
    optimizer = make_optimizer(parts, spec(warmup_steps=0, weight_decay=0, adam_epsilon=0.5))
    optimizer.step()
    assert parameter.item() == pytest.approx(before - 0.2 * 3 / (3 + 0.5))
    assert optimizer.state[parameter]["exp_avg"].item() == pytest.approx(0.1 * 3)
    assert optimizer.state[parameter]["exp_avg_sq"].item() == pytest.approx(0.05 * 9)


def test_a_rank_without_norms_has_an_optimizer_too() -> None:
    assert len(make_optimizer(nn.Linear(2, 2, bias=False), spec()).param_groups) == 2
