"""Ranks that attend to some micro-batches only, heads apart: what test_engine_equality does not look at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_engine_equality import CASES, LENGTH, STEPS, Case, arrays, batches, reference, starve
from workers import run_workers

from hetermoe_cli.model.weights.training_state import training_tensors

HELPS, AT_TIMES, AS_TWO, ALONE = (name for name in CASES if name.startswith("shifts"))
HEAD, HEAD_IN_SHIFTS = (
    "head in parts of sequences, windows, between, recompute",
    "head on a host and one that attends, in shifts",
)


def build(rank: int, case: Case, precision: str, precisions: Sequence[str] = ()) -> Any:
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.step.trainer import Trainer

    return Trainer.build(
        case.model, case.layout, case.train, join(case.layout, "cpu"),
        sequence_length=LENGTH, precision=precision, rank_precisions=precisions,
    )  # fmt: skip


def validated(rank: int, case: Case) -> float:
    trainer = build(rank, case, "fp64")
    starve(trainer.parts)  # as the reference does
    loss: float = trainer.validate(batches(), 1)
    return loss


@pytest.mark.parametrize("name", [HELPS, AS_TWO, HEAD, HEAD_IN_SHIFTS])
def test_validation_equals_the_reference(name: str) -> None:
    case = CASES[name]
    wanted = reference(case)[0].figures[0]
    for loss in run_workers(len(case.sequences), validated, case):
        assert loss == pytest.approx(wanted, rel=1e-12)


def kept_rows(rank: int, case: Case) -> int:
    """Parcels of its own that a rank still holds after a step."""
    trainer = build(rank, case, "fp64")
    trainer.step(batches(), 0)
    return len(trainer.engine._rows._kept)


def test_hosts_keep_no_rows_for_micro_batches_that_they_do_not_attend_to() -> None:
    case = CASES[AT_TIMES]
    assert run_workers(len(case.sequences), kept_rows, case) == [0, 0, 0, 0]


Run = tuple[list[float], float, dict[str, np.ndarray]]  # losses, first norm, and masters with moments at the end


def stepped(rank: int, case: Case) -> list[Run]:
    """In fp64, and in precisions that fold their gradients."""
    result = []
    for precision, ranks in (("fp64", ()), ("bf16", ("bf16", "fp32", "bf16", "bf16"))):
        trainer = build(rank, case, precision, ranks)
        steps = [trainer.step(batches(), step) for step in range(STEPS)]
        states = arrays(training_tensors(trainer.parts, trainer.optimizer))
        result.append(([step.loss for step in steps], steps[0].gradient_norm, states))
    return result


@pytest.mark.parametrize("name", [HELPS, AT_TIMES])
def test_narrow_gradients_are_summed_whole(name: str) -> None:
    """They are rounded into their places after each rank's own last micro-batch of a layer."""
    case = CASES[name]
    seen: dict[str, np.ndarray] = {}
    for (wanted, norm, _), (losses, narrow, states) in run_workers(len(case.sequences), stepped, case):
        assert losses == pytest.approx(wanted, rel=0.01)
        assert narrow == pytest.approx(norm, rel=0.02)
        for key, value in states.items():
            np.testing.assert_array_equal(value, seen.setdefault(key, value), err_msg=key)
