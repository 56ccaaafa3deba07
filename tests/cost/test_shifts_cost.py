"""Costs of layouts whose ranks attend to some micro-batches only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import in_shifts, make_cost, make_layout
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.load import AssumedLoad, balanced_load
from hetermoe_cli.schedule.action import parse_action
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.trace import Span


@given(in_shifts(), st.integers(1, 3))
def test_all_on_every_shift_cost_what_a_layout_without_costs(layout: Layout, devices: int) -> None:
    everyone = [[*range(layout.micro_batches)] if count else [] for count in layout.sequences_per_rank]
    world = layout.world_size
    nodes = [("new", min(devices, world - first)) for first in range(0, world, devices)]
    plain = make_cost(layout.model_copy(update={"shifts": []}), nodes)
    on = LayoutCost(plain.cost, layout.model_copy(update={"shifts": everyone}))
    one, other = simulate(plain), simulate(on)
    assert other.seconds == one.seconds
    assert sorted(other.spans) == sorted(one.spans)
    for rank in range(world):
        assert on.memory(rank) == plain.memory(rank)
        assert on.parameters(rank) == plain.parameters(rank)


@given(in_shifts())
def test_rows_come_from_those_on_shift(layout: Layout) -> None:
    cost = make_cost(layout).cost
    shares = np.full((layout.layers, layout.experts), 1 / layout.experts)
    balanced, assumed = balanced_load(cost, layout), AssumedLoad(shares, cost, layout)
    for layer in range(layout.layers):
        for j in range(layout.micro_batches):
            rows = balanced(layer, j)
            assert tuple(np.flatnonzero(rows.sum(axis=1))) == layout.crew(layer, j)
            assert rows.sum() == pytest.approx(balanced(0, 0).sum())  # equal micro-batches
            np.testing.assert_allclose(assumed(layer, j), rows)


@pytest.mark.parametrize(("shift", "at_once"), [([1], 1), ([0, 1], 2), ([0, 2], 1), ([0, 1, 2, 3], 2)])
def test_activations_of_the_micro_batches_of_a_window_that_a_rank_attends_to(shift: list[int], at_once: int) -> None:
    """Windows of two: less memory on fewer shifts, more only where they fall into one window."""
    plain = make_layout((1, 1, 0), (0, 0, 4), micro_batches=4, schedule="windowed")
    other = [j for j in range(4) if j not in shift]
    counts = [1, 1 if other else 0, 0]
    layout = Layout.model_validate(plain.model_dump() | {"sequences_per_rank": counts, "shifts": [shift, other, []]})
    cost = make_cost(layout)
    assert layout.on_shift_at_once(0) == at_once
    alone = make_layout((1, 0, 0), (0, 0, 4), micro_batches=4, schedule="windowed")
    always = LayoutCost(cost.cost, alone).memory(0)
    found = cost.memory(0)
    assert (found.activations_bytes < always.activations_bytes) == (at_once < 2)
    assert found.weights_bytes == always.weights_bytes


def starts(spans: list[Span]) -> dict[tuple[int, str], float]:
    return {(span.rank, span.name): span.start for span in spans}


def test_an_old_device_takes_one_micro_batch_over() -> None:
    """The new one skips it, and the ports of its transfers are those of who is on shift."""
    plain = make_layout((1, 1, 0), (0, 0, 4), micro_batches=4)
    layout = Layout.model_validate(plain.model_dump() | {"shifts": [[0, 1, 3], [2], []]})
    cost = make_cost(layout)
    found = starts(simulate(cost).spans)
    assert (0, "0AF2") not in found
    assert found[1, "0AF2"] == found[0, "0AF0"] == 0.0
    ports = [cost.transfer(parse_action(f"0DF{j}")).ports for j in range(4)]
    assert ports[0] == ports[1] == ports[3] != ports[2]
    rows = [cost.transfer(parse_action(f"0DF{j}")).seconds for j in range(4)]
    assert rows == [rows[0]] * 4
