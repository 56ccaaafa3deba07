"""Longer runs: the same plan is bit-exact; another plan stays within rounding after 200 float64 steps."""

from functools import cache

import numpy as np
import pytest
from single_device import trained
from test_engine_equality import LENGTH, MODEL, Case, batches, hosts
from workers import run_workers

from hetermoe_cli.model.transformer import named_tensors
from hetermoe_cli.spec.train import TrainSpec

STEPS = 200
UNEVEN = "uneven, experts everywhere"
TRAIN = TrainSpec(sequence_length=LENGTH, global_batch_sequences=8, steps=STEPS, warmup_steps=10, learning_rate=3e-3)
CASES = {
    "R=1": Case([8, 0], hosts([], list(range(6))), 1),
    "R=4": Case([2, 0], hosts([], list(range(6))), 4),
    UNEVEN: Case([3, 1], hosts([0, 5], [1, 2, 3], replicated=(4,)), 2),
}


def weights_and_loss(rank: int, case: Case) -> tuple[dict[str, np.ndarray], float]:
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.step.trainer import Trainer

    mesh = join(case.layout, "cpu")
    trainer = Trainer.build(MODEL, case.layout, TRAIN, mesh, sequence_length=LENGTH, precision="fp64")
    data = batches()
    loss = [trainer.step(data, step).loss for step in range(STEPS)][-1]
    return {name: tensor.numpy().copy() for name, tensor in named_tensors(trainer.parts).items()}, loss


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, np.ndarray], float]:
    model, _, losses = trained(TRAIN)
    return {name: tensor.numpy().copy() for name, tensor in named_tensors(model).items()}, losses[-1]


def run(name: str) -> list[tuple[dict[str, np.ndarray], float]]:
    """Of every rank."""
    return run_workers(len(CASES[name].sequences), weights_and_loss, CASES[name])


once = cache(run)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_equals_reference_after_200_steps(name: str, reference: tuple[dict[str, np.ndarray], float]) -> None:
    for weights, loss in once(name):
        assert loss == pytest.approx(reference[1], abs=1e-9)
        for tensor, value in weights.items():
            np.testing.assert_allclose(value, reference[0][tensor], rtol=0, atol=1e-9, err_msg=tensor)


@pytest.mark.long
def test_same_plan_is_bit_exact() -> None:
    for (weights, loss), (again, loss_again) in zip(once(UNEVEN), run(UNEVEN), strict=True):
        assert loss == loss_again
        assert all(np.array_equal(weights[name], again[name]) for name in weights)
