"""cost/model.py: the dense part replicated, with sharded optimizer states, or fully sharded."""

from typing import Any, get_args

import pytest

from builders import make_inputs, make_layout, make_model
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.sharers import Sharers
from hetermoe_cli.planner.instance.choice import Choice, group
from hetermoe_cli.planner.instance.device_rates import device_rates
from hetermoe_cli.planner.instance.rates import Rates
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.schedule.zebra import OPTIMIZER
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.train import DenseState

MODEL = make_model(layers=4, vocab_size=64)
INPUTS = make_inputs([("new", 1)] * 3, model=MODEL, global_batch_sequences=4)
DENSE = MODEL.dense_parameters


def costs(state: Any, micro_batches: int = 2, window: int = 2) -> LayoutCost:
    """Ranks 0 and 1 attend to a sequence each, rank 2 hosts all experts."""
    layout = make_layout((1, 1, 0), (0, 0, 4), layers=4, micro_batches=micro_batches)
    schedule = layout.schedule.model_copy(update={"dense_state": state, "window": window})
    return LayoutCost(CostModel(INPUTS), Layout.model_validate({**dict(layout), "schedule": schedule}))


def gathers_of(cost: LayoutCost) -> dict[Action, float]:
    """Seconds of every gather of an iteration, in order."""
    transfers = training_schedule(cost.layout).transfers
    return {action: cost.transfer(action).seconds for action in transfers if action.kind is Kind.GATHER}


def test_memory_by_hand() -> None:
    kinds = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
    found = {state: [getattr(costs(state).memory(0), kind) / DENSE for kind in kinds] for state in get_args(DenseState)}
    assert found["replicated"] == pytest.approx([2, 2, 12])
    assert found["optimizer"] == pytest.approx([2, 2, 6])
    layer, embedding = MODEL.attention_layer_parameters, 64 * MODEL.hidden_size
    whole = (2 * layer + embedding) / DENSE  # two segments: layer 0 with the embedding, and layer 1 or the head
    assert MODEL.edge_parameters - embedding < layer
    assert found["full"] == pytest.approx([2 * whole, 1 + 2 * whole, 6], rel=1e-4)  # masters are the share of weights
    assert costs("full").memory(2) == costs("replicated").memory(2)  # a pure host holds no dense part


def test_each_attending_rank_updates_its_share() -> None:
    whole = costs("replicated").seconds(0, OPTIMIZER)
    assert costs("optimizer").seconds(0, OPTIMIZER) == pytest.approx(whole / 2)
    assert costs("full").seconds(0, OPTIMIZER) == pytest.approx(whole / 2)
    assert costs("full").seconds(2, OPTIMIZER) == costs("replicated").seconds(2, OPTIMIZER)


def test_wide_ranks_hold_their_share_of_the_weights() -> None:
    inputs = make_inputs([("new", 1)] * 3, model=MODEL, global_batch_sequences=4, precision="fp32")
    cost = CostModel(inputs)
    weights, gradients, optimizer = cost.dense_state_bytes(costs("full").layout.schedule, 2)
    whole = 4 * (cost.segment_parameters(0) + cost.segment_parameters(1))
    assert (weights, gradients, optimizer) == (2 * DENSE + whole, 2 * DENSE + whole, 4 * DENSE)
    assert cost.dense_state_bytes(costs("full").layout.schedule, 1) == (
        4 * DENSE,
        4 * DENSE,
        8 * DENSE,
    )  # nothing to share


@pytest.mark.parametrize(("window", "halves"), [(2, 2), (1, 5)])  # 2 gathers a window, scatters of all but the last
def test_what_is_gathered_and_when(window: int, halves: int) -> None:
    once = 2 * DENSE / 1e9  # a ring of two over 1 GB/s: each sends the fp16 gradients once

    def seconds(state: Any) -> float:
        cost = costs(state, window=window)
        return sum(cost.collective(Kind.REDUCE, layer).seconds for layer in range(MODEL.layers + 1))

    assert seconds("replicated") == pytest.approx(once)
    assert seconds("optimizer") == pytest.approx(once / 2)
    assert seconds("full") == pytest.approx(once / 2)
    assert not gathers_of(costs("replicated", window=window))
    renewed = gathers_of(costs("optimizer", window=window))
    assert [*renewed] == [Action(Kind.GATHER, Pass.FORWARD, layer, 0) for layer in range(5)]
    assert sum(renewed.values()) == pytest.approx(once / 2)
    full = costs("full", window=window)
    gathers = [full.collective(Kind.GATHER, layer).seconds for layer in range(MODEL.layers + 1)]
    assert sum(gathers) == pytest.approx(once / 2)
    schedule, attending = full.layout.schedule, full.layout.attending
    assert full.cost.sharding_seconds(schedule, attending) == pytest.approx(once / 2 * halves)
    assert full.cost.synchronise_seconds(schedule, attending, 0) == pytest.approx(once / 2 * (1 + halves))
    moved = [action for action in training_schedule(full.layout).transfers if action.kind is Kind.GATHER]
    assert [(action.layer, action.direction) for action in moved[:8]] == [
        *((layer, "F") for layer in range(5)), (2, "B"), (1, "B"), (0, "B")
    ]  # fmt: skip
    assert [(action.layer, action.direction) for action in moved[8:]] == [
        *((layer, "F") for layer in (2, 3, 4)), (2, "B"), (1, "B"), (0, "B")
    ] * (window == 1)  # fmt: skip


def test_replicated_experts_are_summed_once_beside_the_scattered_gradients() -> None:
    layout = make_layout((1, 1, 0), (0, 0, 3), replicated=1, layers=4, micro_batches=2, dense_state="full")
    layout = layout.model_copy(update={"schedule": layout.schedule.model_copy(update={"window": 1})})
    cost = LayoutCost(CostModel(INPUTS), layout)
    first, last = (cost.transfer(Action(Kind.REDUCE, Pass.BACKWARD, 1, j)).seconds for j in (0, 1))
    assert last - first == pytest.approx(MODEL.expert_parameters / 1e9)
    assert first == pytest.approx(MODEL.attention_layer_parameters / 1e9)


@pytest.mark.parametrize("state", get_args(DenseState))
def test_replicated_experts_are_stepped_in_shares_and_their_weights_gathered(state: Any) -> None:
    plain, copied = (
        LayoutCost(
            CostModel(INPUTS),
            make_layout((1, 1, 0), (0, 0, 4 - count), replicated=count, layers=4, micro_batches=2, dense_state=state),
        )
        for count in (0, 1)
    )
    more, shared = 4 * MODEL.expert_parameters, 1 if state == "replicated" else 2  # copies on each of two ranks
    kinds = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
    found = [getattr(copied.memory(0), kind) - getattr(plain.memory(0), kind) for kind in kinds]
    assert found == pytest.approx([2 * more, 2 * more, 12 * more / shared])
    assert copied.parameters(0) - plain.parameters(0) == more / shared
    assert copied.parameters(2) == 3 * more
    gathered = sum(gathers_of(copied).values()) - sum(gathers_of(plain).values())
    assert gathered == pytest.approx(0.0 if state == "replicated" else more * 2 / 1e9 / 2)
    rates = Rates(
        copied.cost,
        Choice(copied.layout.schedule, (1, 1, 0)),
        group(copied.cost.devices, (1, 1, 0)),
    )
    attending, host = rates.of
    step = copied.seconds(0, OPTIMIZER) - plain.seconds(0, OPTIMIZER)
    assert attending.optimizer_per_copy == pytest.approx(step / 4)
    assert host.optimizer_per_copy == 0.0
    assert [each for _, each in rates.gathers] == pytest.approx([*[gathered / 4] * 4, 0.0])


@pytest.mark.parametrize("state", get_args(DenseState))
def test_groups_share_out_states_among_all_holders(state: Any) -> None:
    """A pair with a copied expert, twice, and a rank alone: ranks of all groups together step every parameter once."""
    pair = make_layout((1, 1), (2, 1), replicated=1, layers=4, dense_state=state)
    alone = make_layout((2,), (4,), layers=4, dense_state=state)
    sharers = Sharers.of([(pair, 2), (alone, 1)])
    assert sharers.dense.tolist() == [1 if state == "replicated" else 5] * 5
    assert sharers.experts.tolist() == [[1, 1, 1, 1] if state == "replicated" else [3, 3, 3, 5]] * 4
    total = 0.0
    for layout, copies in ((pair, 2), (alone, 1)):
        cost = LayoutCost(CostModel(INPUTS), layout)
        cost.sharers = sharers
        own = [cost.parameters(rank) for rank in range(layout.world_size)]
        total += copies * sum(own)
        for rank, stepped in enumerate(own):
            assert cost.memory(rank).optimizer_bytes == int(12 * stepped)
    copied = MODEL.layers * MODEL.expert_parameters
    wanted = {
        "replicated": 3 * MODEL.parameters + 2 * (DENSE + copied),
        "optimizer": MODEL.parameters,
        "full": MODEL.parameters + 2 * DENSE,  # each group shares out its own
    }
    assert total == pytest.approx(wanted[state])


def test_experts_are_shared_out_nowhere_if_one_group_does_not() -> None:
    pair = make_layout((1, 1), (2, 1), replicated=1, layers=4, dense_state="full")
    cost = LayoutCost(CostModel(INPUTS), pair)
    cost.sharers = Sharers.of([(pair, 1), (make_layout((2,), (4,), layers=4), 1)])
    assert cost.parameters(0) == DENSE / 2 + 4 * 3 * MODEL.expert_parameters


def test_gathers_hide_behind_compute_where_there_is_enough() -> None:
    """A replay of the sharded layout takes longer than one of the replicated layout by less than its gathers."""
    plain, full = costs("replicated"), costs("full")
    gathers = sum(full.collective(Kind.GATHER, layer).seconds for layer in range(MODEL.layers + 1))
    times = {cost: simulate(cost).seconds for cost in (plain, full)}
    assert times[full] - times[plain] < 0.5 * gathers


@pytest.mark.parametrize("state", get_args(DenseState))
def test_rates_say_what_the_layout_costs_and_without_a_count_no_more(state: Any) -> None:
    cost = costs(state)
    schedule = cost.layout.schedule
    exact, bound = (device_rates(cost.cost, 0, 1, schedule, 2, attending) for attending in (2, None))
    memory, other = cost.memory(0), costs("replicated").memory(0)
    plain = device_rates(cost.cost, 0, 1, costs("replicated").layout.schedule, 2)
    assert exact.memory_base - plain.memory_base == pytest.approx(memory.total_bytes - other.total_bytes, abs=3)
    assert exact.optimizer_base == pytest.approx(cost.seconds(0, OPTIMIZER))
    assert bound.memory_base <= exact.memory_base
    assert bound.optimizer_base <= exact.optimizer_base
