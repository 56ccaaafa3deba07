"""Costs of layouts with pipeline stages, by hand; one stage with everything costs what a layout without any does."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given

from builders import layouts, make_cost, make_inputs, make_layout, make_model, sequential
from hetermoe_cli.cost.crossing import shared_tokens
from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.moving import holders
from hetermoe_cli.cost.sharers import Sharers
from hetermoe_cli.schedule.action import Kind, parse_action
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.layout import LayerPlacement, Layout, PipelineStage
from hetermoe_cli.spec.schedule_choice import ScheduleChoice

FREE = Link(bandwidth_gigabytes_per_second=1e9, latency_microseconds=0.0)
FORWARD, HEAD = 1 + 64 * 0.01, 3 * 64 * 0.005  # of a sequence: a layer with 64 rows; the head with its backward


def staged(
    stages: Sequence[tuple[int, Sequence[int]]],
    sequences: Sequence[int],
    *,
    experts: int = 4,
    replicated: int = 0,
    schedule: ScheduleChoice | None = None,
) -> Layout:
    """Stages of (layers, ranks), the experts of each dealt in turn to its ranks but for the last `replicated`."""
    placement = []
    for layers, ranks in stages:
        hosted: list[list[int]] = [[] for _ in sequences]
        for expert in range(experts - replicated):
            hosted[ranks[expert % len(ranks)]].append(expert)
        copied = list(range(experts - replicated, experts))
        placement += [LayerPlacement(experts=hosted, replicated=copied)] * layers
    return Layout(
        schedule=schedule or sequential(2),
        sequences_per_rank=list(sequences),
        placement=placement,
        pipeline=[PipelineStage(layers=layers, ranks=list(ranks)) for layers, ranks in stages],
    )


def whole(layout: Layout) -> Layout:
    """The same with one pipeline stage that has all layers and ranks."""
    stage = PipelineStage(layers=layout.layers, ranks=list(range(layout.world_size)))
    return Layout.model_validate(layout.model_dump() | {"pipeline": [stage.model_dump()]})


@given(layouts().filter(lambda layout: layout.schedule.dense_state != "full"))
def test_one_stage_is_no_pipeline(layout: Layout) -> None:
    plain = make_cost(layout)
    one = LayoutCost(plain.cost, whole(layout))
    assert simulate(one).seconds == simulate(plain).seconds
    ranks = range(layout.world_size)
    assert [one.parameters(rank) for rank in ranks] == [plain.parameters(rank) for rank in ranks]
    assert [one.memory(rank) for rank in ranks] == [plain.memory(rank) for rank in ranks]
    plain.sharers = one.sharers = Sharers.of([(layout, 2)])
    assert [one.parameters(rank) for rank in ranks] == [plain.parameters(rank) for rank in ranks]


def test_one_stage_of_a_model_with_dense_layers_has_all_dense_parameters() -> None:
    model = make_model(layers=3, dense_layers=2, dense_ffn_size=64, shared_experts=1)
    layout = make_layout((1, 1), (2, 2), layers=3)
    cost = LayoutCost(CostModel(make_inputs([("new", 2)], model=model)), whole(layout))
    assert cost.parameters(0) == LayoutCost(cost.cost, layout).parameters(0)
    assert cost.memory(0) == LayoutCost(cost.cost, layout).memory(0)


def test_a_pipeline_of_two_stages_by_hand() -> None:
    """F0 F1 B0 B1 before F0 H0 B0 F1 H1 B1; links that take no time."""
    cost = make_cost(staged([(1, [0]), (1, [1])], [1, 1]), network=FREE, interconnect=FREE)
    step = 1e-6 * max(cost.parameters(0), cost.parameters(1))
    last = 2 * (FORWARD + HEAD + 2 * FORWARD)
    assert simulate(cost).seconds == pytest.approx(FORWARD + last + 2 * FORWARD + step)
    assert cost.seconds(0, parse_action("1PF0")) == cost.seconds(0, parse_action("1PB0")) == 0


def test_stages_of_several_layers_and_ranks_by_hand() -> None:
    """Three stages, four micro-batches; the first one, of two layers, is never idle once a gradient came back to it."""
    layout = staged([(2, [0, 1]), (1, [2, 3]), (1, [4, 5])], [1] * 6, schedule=sequential(4))
    cost = make_cost(layout, [("new", 2)] * 3, network=FREE, interconnect=FREE)
    step = 1e-6 * max(map(cost.parameters, range(6)))
    back = (2 + 1 + 1) * FORWARD + HEAD + 2 * (1 + 1) * FORWARD
    assert simulate(cost).seconds == pytest.approx(back + 4 * 4 * FORWARD + 2 * FORWARD + step)


def test_full_recompute_sends_rows_again_where_gradients_come_back() -> None:
    schedule = sequential(2, recompute="full")
    cost = make_cost(staged([(1, [0]), (1, [1])], [1, 1], schedule=schedule))
    assert cost.seconds(0, parse_action("1PB0")) == pytest.approx(1.0)  # as with the head on the last stage
    assert cost.seconds(1, parse_action("0HB0")) == pytest.approx(HEAD + 1.0)
    assert cost.seconds(1, parse_action("1AB0")) == cost.seconds(0, parse_action("0AB0")) == pytest.approx(2.0)


def test_hidden_states_cross_between_ranks_with_common_sequences() -> None:
    """4 + 2 sequences go to 3 + 3: the first rank sends 3 and 1, the second 2."""
    layout = staged([(1, [0, 1]), (1, [2, 3])], [4, 2, 3, 3])
    shared, before, after = shared_tokens(layout, 1, 6 * 64)
    assert (shared.tolist(), before.tolist(), after.tolist()) == ([[192, 64], [0, 128]], [0, 1], [2, 3])
    pairs = [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert [layout.cross(1, *pair) for pair in pairs] == (shared > 0).ravel().tolist()
    cost, network = make_cost(layout), make_cost(layout).cost.network
    there, back = cost.transfer(parse_action("1XF0")), cost.transfer(parse_action("1XB1"))
    assert there.seconds == back.seconds == pytest.approx(4 * 64 * 128 / 1e9)  # rank 0 sends most
    used = [(0, 2), (0, 3), (1, 3)]
    assert {*there.ports} == {int(p) for s, d in used for p in (network.out_port[s, d], network.in_port[s, d])}
    assert {*back.ports} == {int(p) for d, s in used for p in (network.out_port[s, d], network.in_port[s, d])}
    assert cost.slowest_port(parse_action("1XF0")) == network.out_port[0, 2]
    assert cost.slowest_port(parse_action("1XB0")) == network.in_port[2, 0]


def test_only_the_ranks_of_a_stage_send_rows_and_sum_gradients() -> None:
    layout = staged([(1, [0, 1]), (1, [2, 3])], [2, 0, 1, 1], replicated=2)
    cost = make_cost(layout)
    assert [cost.expert_rows(rank, layer, 0) for rank, layer in ((0, 0), (1, 0), (2, 1), (3, 1))] == [
        [32, 32, 32],
        [32],
        [32, 16, 16],
        [32, 16, 16],
    ]
    assert cost.collective(parse_action("0RB1").kind, 0).seconds == 0  # one rank attends
    size = cost.cost.segment_parameters(1) * 2 + 2 * cost.cost.expert_gradient_bytes
    assert cost.collective(parse_action("1RB1").kind, 1).seconds == pytest.approx(size / 1e9)
    assert {*cost.transfer(parse_action("1DF0")).ports} <= {
        *cost.cost.network.ports(np.array([2, 3]), np.array([2, 3]))
    }
    assert holders(layout, 0)[3] == {0}
    assert holders(layout, 1)[3] == {2, 3}


@pytest.mark.parametrize("state", ["replicated", "optimizer"])
def test_parameters_of_stages_are_the_models(state: str) -> None:
    schedule = sequential(2).model_copy(update={"dense_state": state})
    layout = staged([(1, [0, 1]), (2, [2, 3])], [1] * 4, schedule=schedule)
    cost = make_cost(layout)
    total = sum(cost.parameters(rank) for rank in range(4))
    again = cost.cost.model.dense_parameters if state == "replicated" else 0  # on two ranks each
    assert total == pytest.approx(cost.cost.model.parameters + again)
    gathers = [action for action in training_schedule(layout).transfers if action.kind is Kind.GATHER]
    assert len(gathers) == 4 * (state == "optimizer")
    for action in gathers:
        size = cost.cost.segment_parameters(action.layer) * cost.cost.gradient_bytes
        ranks = layout.attending_at(action.layer)
        assert cost.transfer(action).seconds == pytest.approx(cost.cost.network.all_reduce_seconds(ranks, size) / 2)


def test_memory_of_a_staged_rank() -> None:
    """Weights of its own layers; activations of as many windows as it keeps; hidden states that cross."""
    cost = make_cost(staged([(1, [0]), (2, [1]), (1, [2])], [1, 1, 1], schedule=sequential(4)))
    model, sizes = cost.cost.model, STATE_BYTES["fp16"]
    found = [cost.memory(rank) for rank in range(3)]
    own = [cost.parameters(rank) for rank in range(3)]
    assert sum(own) == model.parameters
    assert [m.weights_bytes for m in found] == [count * sizes[0] for count in own]
    assert [m.optimizer_bytes for m in found] == [count * sizes[2] for count in own]
    token, tensor = 100, 64 * 128  # saved of a token or a row; a micro-batch's hidden states
    kept = [layers * 2 * 64 * token + tensor for layers in (1, 2, 1)]  # attention and experts; a gradient that waits
    device = cost.cost.of(0)
    for rank, windows in enumerate((3, 2, 1)):
        span = cost.layout.span_of(rank)
        transient = cost.cost.transient_bytes(device, 1, cost.layout.schedule, span)
        experts = 4 * cost.cost.expert_transient_bytes(device, 16, cost.layout.schedule)
        largest = cost.cost.expert_task_bytes(device, 16)
        assert found[rank].activations_bytes == int(windows * kept[rank] + transient + experts + largest)
    plain = make_cost(make_layout((1,), (4,), layers=4, schedule="sequential")).memory(0).buffers_bytes
    assert [m.buffers_bytes - plain for m in found] == [4 * tensor, 8 * tensor, 4 * tensor]


def test_only_the_last_stage_makes_room_for_the_head() -> None:
    cost = make_cost(staged([(1, [0]), (1, [1])], [1, 1])).cost
    layout = staged([(1, [0]), (1, [1])], [1, 1])
    first, last = (cost.transient_bytes(cost.of(0), 1, layout.schedule, span) for span in layout.spans)
    assert first == 4 * cost.model.attention_layer_parameters  # fp32 beside narrow gradients
    assert last == cost.transient_bytes(cost.of(0), 1, layout.schedule) > first


@pytest.mark.parametrize(("micro_batches", "alive"), [(8, [3.5, 2.0]), (3, [3.0, 2.0]), (1, [1.0, 1.0])])
def test_of_a_woven_step_one_window_fills_up_as_the_other_empties(micro_batches: int, alive: list[float]) -> None:
    layout = staged([(2, [0]), (1, [1])], [1, 1])
    changes = {"micro_batches": micro_batches, "window": 1, "passes": "woven"}
    woven = layout.model_copy(update={"schedule": layout.schedule.model_copy(update=changes)})
    assert [woven.windows_in_flight(rank) for rank in (0, 1)] == alive
