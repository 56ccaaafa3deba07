"""Costs of layouts whose head is apart from attention."""

import pytest
from hypothesis import given

from builders import make_cost, make_layout, with_heads
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.schedule.action import parse_action
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.layout import Layout

FREE = Link(bandwidth_gigabytes_per_second=1e9, latency_microseconds=0)
HEAD = parse_action("0HB0")


def apart(layout: Layout, head: list[int]) -> Layout:
    return layout.model_copy(update={"head": head})


def test_ranks_take_as_long_as_their_share_of_the_tokens() -> None:
    plain = make_cost(make_layout((2, 2, 0, 0), (0, 0, 2, 2)), network=FREE, interconnect=FREE)
    cost = LayoutCost(plain.cost, apart(plain.layout, [1, 0, 3, 4]))
    whole = plain.seconds(0, HEAD) + plain.seconds(1, HEAD)
    assert cost.seconds_by_rank(HEAD) == pytest.approx([whole / 8, 0, 3 * whole / 8, whole / 2])
    assert [cost.seconds(0, parse_action(task)) for task in ("2PF0", "2PB0")] == [0, 0]


def test_hidden_states_go_to_where_their_head_is() -> None:
    """Rank 0 keeps half of its two sequences and sends the others, 2 x 64 tokens of 64 numbers."""
    layout = apart(make_layout((4, 0), (0, 4)), [1, 1])
    cost = make_cost(layout)
    there, back = cost.transfer(parse_action("2XF0")), cost.transfer(parse_action("2XB0"))
    assert there.seconds == back.seconds == pytest.approx(2 * 64 * cost.cost.row_bytes / 1e9)
    assert {port ^ 1 for port in there.ports} == {*back.ports}


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_head_as_attended_to_takes_no_longer_where_links_are_free(micro_batches: int) -> None:
    plain = make_cost(make_layout((1, 1), (2, 2), micro_batches=micro_batches), network=FREE, interconnect=FREE)
    same = LayoutCost(plain.cost, apart(plain.layout, [1, 1]))
    assert simulate(same).seconds == pytest.approx(simulate(plain).seconds)


@given(with_heads())
def test_every_parameter_is_stepped_once_where_states_are_shared_out(layout: Layout) -> None:
    schedule = layout.schedule.model_copy(update={"dense_state": "optimizer"})
    cost = make_cost(layout.model_copy(update={"schedule": schedule}))
    stepped = sum(map(cost.parameters, range(layout.world_size)))
    assert stepped == pytest.approx(cost.cost.model.parameters)


def test_who_computes_the_head_holds_it() -> None:
    plain = make_cost(make_layout((1, 1, 0, 0), (0, 0, 2, 2)))
    cost = LayoutCost(plain.cost, apart(plain.layout, [0, 0, 1, 0]))
    head = cost.cost.head_parameters
    assert [cost.parameters(rank) - plain.parameters(rank) for rank in range(4)] == [-head, -head, head, 0]
    for rank, held in enumerate((-head, -head, head, 0)):
        one, other = plain.memory(rank), cost.memory(rank)
        assert other.weights_bytes - one.weights_bytes == 2 * held  # in fp16
        assert other.gradients_bytes - one.gradients_bytes == 2 * held
        assert other.optimizer_bytes - one.optimizer_bytes == 12 * held
    assert cost.memory(2).activations_bytes > plain.memory(2).activations_bytes
    assert cost.memory(2).buffers_bytes > plain.memory(2).buffers_bytes
    for rank in (0, 1):
        assert cost.memory(rank).activations_bytes < plain.memory(rank).activations_bytes
    assert cost.memory(3) == plain.memory(3)
