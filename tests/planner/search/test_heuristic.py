"""Climbs: single moves for short models, moves of many layers at once for deep ones."""

import time
from math import inf

import numpy as np
import pytest

from builders import make_inputs, make_model, make_profile, make_schedule
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.instance.choice import Choice
from hetermoe_cli.planner.instance.prepared import Prepared
from hetermoe_cli.planner.search import heuristic
from hetermoe_cli.planner.search.heuristic import MANY


def ready(layers: int) -> Prepared:
    """Two devices that attend, two four times slower ones that do not; 8 experts."""
    model = make_model(layers=layers, experts=8)
    profiles = {
        name: make_profile(name, model=model, attention_seconds=1e-3 * slow, expert_seconds=1e-3 * slow)
        for name, slow in (("new", 1), ("old", 4))
    }
    inputs = make_inputs([("new", 2), ("old", 2)], model=model, profiles=profiles, global_batch_sequences=8)
    return Prepared.of(CostModel(inputs), Choice(make_schedule("zebra", 4), (1, 1, 0, 0)))


@pytest.mark.parametrize("layers", [2, MANY, MANY + 1, 4 * MANY])
def test_moves_keep_the_experts_of_every_layer(layers: int) -> None:
    moves = heuristic.moves_of(ready(layers).rates)
    assert not moves.sum(2).any()
    changed = (moves != 0).any(2).sum(1)
    assert changed.min() == 1
    assert changed.max() == (1 if layers <= MANY else layers)
    assert len(moves) <= 3 * len(moves[changed == 1])


def test_a_climb_levels_a_deep_model_in_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """From all experts on the old devices; one layer at a time would take more rounds than there are."""
    one = ready(4 * MANY)
    start = np.zeros((1, 4 * MANY, 3), dtype=np.int64)
    start[:, :, 1] = 8
    rounds = 0
    evaluate = heuristic.evaluate

    def counted(*arguments):  # type: ignore[no-untyped-def]
        nonlocal rounds
        rounds += 1
        return evaluate(*arguments)

    monkeypatch.setattr(heuristic, "evaluate", counted)
    found = heuristic.improve(one.rates, one.tasks, start, inf, time.monotonic() + 60)
    assert found is not None
    best = float(evaluate(one.rates, one.tasks, found[None])[0])
    level = [evaluate(one.rates, one.tasks, np.array([[[n, 8 - n, 0]] * (4 * MANY)]))[0] for n in range(9)]
    assert best <= min(level) * (1 + 1e-9) < float(evaluate(one.rates, one.tasks, start)[0])
    assert rounds <= heuristic.ROUNDS / 2


def test_deep_models_exchange_layers_that_lie_a_power_of_two_apart() -> None:
    table = np.arange(2 * MANY)[:, None] * np.array([[1, -1, 0]])
    swapped = heuristic._swaps(table)
    distances = {int(np.diff(np.flatnonzero((one != table).any(1)))[0]) for one in swapped}
    assert distances == {1, 2, 4, 8, 16}
