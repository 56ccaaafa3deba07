"""The smallest change that would fit: each kind, and that it does fit while less does not."""

import re
from typing import Any

import pytest

from builders import make_inputs, make_model, make_profile
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.reasons import remedies
from hetermoe_cli.planner.reasons.remedies import fits, lacking_states, possible, smallest_change
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.plan import Plan


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are confirmed however slow the machine is."""
    monkeypatch.setattr(remedies, "SECONDS", 300.0)


def tight(
    memory: float, *, saved_bytes: int = 100, extra: int = 0, length: int = 64, batch: int = 4, recompute: str = "auto"
) -> Inputs:
    """One new and one old device, and `extra` new ones, with `memory` bytes each; profiled from 16 to 64 tokens."""
    model = make_model()
    profiles = {
        name: make_profile(
            name, model=model, sequence_lengths=(16, 64), saved_bytes=saved_bytes, memory_bytes=int(memory)
        )
        for name in ("new", "old")
    }
    nodes = [("new", 1), ("old", 1), *[("new", 1)] * extra]
    inputs = make_inputs(nodes, model=model, profiles=profiles, sequence_length=length, global_batch_sequences=batch)
    return inputs.with_train(recompute=recompute)


def planned(inputs: Inputs, limit: int = 16) -> Plan:
    return make_plan(inputs, PlanOptions(solver=SolverOptions(time_limit=2), max_micro_batches=limit))


def refused(inputs: Inputs, limit: int = 16) -> str:
    with pytest.raises(UserError) as caught:
        planned(inputs, limit)
    assert caught.value.code == ExitCode.DOES_NOT_FIT
    return str(caught.value)


def remedy(pattern: str, message: str) -> int:
    """The number in a confirmed change."""
    match = re.search(f"it would fit with (?:.*, or )?{pattern}", message)
    assert match, message
    return int(match[1])


@pytest.mark.long
def test_more_devices() -> None:
    message = refused(tight(4.3e6))
    assert "rank 0 (new) needs 5.83 MB of 3.87 MB usable, most of it optimizer" in message
    extra = remedy(r"(\d+) more new", message)
    planned(tight(4.3e6, extra=extra))
    assert not possible(tight(4.3e6), 16)


def test_recomputation() -> None:
    lacking: dict[str, Any] = {"memory": 9e6, "saved_bytes": 20_000}
    assert refused(tight(**lacking, recompute="none")).endswith("with recompute: auto it would fit")
    assert planned(tight(**lacking)).groups[0].schedule.recompute != "none"


def test_sharded_state() -> None:
    model = make_model(vocab_size=4096)  # the head's states are most of all
    profiles = {
        name: make_profile(name, model=model, sequence_lengths=(64,), memory_bytes=13_500_000)
        for name in ("new", "old")
    }
    inputs = make_inputs([("new", 2), ("old", 2)], model=model, profiles=profiles, global_batch_sequences=4)
    assert refused(inputs).endswith("with dense_state: auto it would fit")
    assert planned(inputs.with_train(dense_state="auto")).groups[0].schedule.dense_state != "replicated"


def test_states_that_all_devices_together_cannot_hold() -> None:
    lacking = lacking_states(CostModel(tight(2e6)))
    assert lacking is not None
    assert "weights, gradients and optimizer states take " in lacking
    assert "all devices together have 1.60 MB usable" in lacking  # 2 devices: 0.9 of 2 MB, less 1 MB of the framework
    more = re.search(r"it would take at least (\d+) more new", lacking)
    assert more
    count = int(more[1])
    assert lacking_states(CostModel(tight(2e6, extra=count))) is None
    assert lacking_states(CostModel(tight(2e6, extra=count - 1))) is not None
    assert lacking_states(CostModel(tight(1e10))) is None


@pytest.mark.long
def test_shorter_sequences() -> None:
    lacking: dict[str, Any] = {"memory": 9.5e6, "saved_bytes": 100_000, "batch": 16}
    message = refused(tight(**lacking))
    assert "most of it activations" in message
    length = remedy(r"sequences of (\d+) tokens", message)
    assert 16 <= length < 64
    assert fits(tight(**lacking, length=length), 16)


@pytest.mark.long
def test_a_smaller_batch_or_more_micro_batches() -> None:
    lacking: dict[str, Any] = {"memory": 12e6, "saved_bytes": 40_000}
    message = refused(tight(**lacking, batch=16), limit=2)
    assert remedy(r"a batch of (\d+) sequences", message) == 2
    assert remedy(r"--max-micro-batches (\d+)", message) == 16
    planned(tight(**lacking, batch=2), limit=2)
    assert not possible(tight(**lacking, batch=4), 2)
    assert not possible(tight(**lacking, batch=16), 8)
    planned(tight(**lacking, batch=16), limit=16)


def test_no_single_change() -> None:
    assert "no one change is enough" in refused(tight(2e6))


@pytest.mark.long
def test_without_a_confirmation_the_least_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remedies, "SECONDS", -1.0)
    assert smallest_change(tight(3.2e6), 16) == "it would take at least one of these, perhaps more of it: 3 more new"
    assert possible(tight(3.2e6, extra=3), 16)
    assert not possible(tight(3.2e6, extra=2), 16)
