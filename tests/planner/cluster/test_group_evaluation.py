"""Points of a group: never faster than what the simulator replays, and within memory."""

import pytest
from cluster_builders import fleet

from builders import make_layout
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.allowed import micro_batch_counts
from hetermoe_cli.planner.cluster.choices import Share, estimate, options
from hetermoe_cli.planner.cluster.curves import Curves
from hetermoe_cli.planner.cluster.evaluate import FULL, evaluate
from hetermoe_cli.planner.cluster.parts import group_inputs
from hetermoe_cli.planner.cluster.replayed import group_cost, replay_group, replay_groups
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.schedule.zebra import OPTIMIZER
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.plan import Group
from hetermoe_cli.spec.schedule_choice import ScheduleChoice
from hetermoe_cli.spec.train import DenseState


def cases() -> list[tuple[Inputs, tuple[int, ...], int]]:
    mixed = fleet()
    return [
        (mixed, (4, 4), 16),
        (mixed, (2, 1), 6),
        (fleet(nics=1, bandwidth=1e-3), (2, 4), 8),
        (fleet(dense_state="auto", memory=5_000_000), (4, 4), 8),
        (fleet(layers=FULL + 4), (2, 4), 8),
    ]


@pytest.mark.parametrize(("inputs", "composition", "share"), cases())
def test_layouts_fit_and_replay_no_slower_than_evaluated(
    inputs: Inputs, composition: tuple[int, ...], share: int
) -> None:
    curves = Curves(inputs, 16, None)
    part = curves.part(composition, 1)
    ranked = options(part, curves.kernels, share, micro_batch_counts(share, 16))
    assert ranked
    assert ranked == sorted(ranked, key=lambda option: option.seconds)
    checked = 0
    for option in ranked[:8]:
        found = evaluate(part, curves.kernels, option)
        if found is None:
            continue
        group = Group.of(found.layout(), [part.ranks])
        assert group.sequences == share
        assert overflow(LayoutCost(group_cost(inputs, group), group.layout)) is None
        replayed, cost = replay_group(inputs, group), group_cost(inputs, group)
        slack = 1e-9 if inputs.model.layers <= FULL else 0.05  # rows of long models are timed apart
        gathers = cost.sharding_seconds(group.schedule, group.layout.attending)  # expected of synchronising
        assert replayed.computed <= found.compute * (1 + slack) + gathers
        assert replayed.optimizer <= found.optimizer * (1 + 1e-9)
        checked += 1
    assert checked


def test_a_point_is_the_best_option_and_is_looked_up_again() -> None:
    curves = Curves(fleet(), 16, 1)
    point = curves.point((4, 4), 16)
    assert point is not None
    evaluated = curves.evaluated
    assert curves.point((4, 4), 16) is point
    assert curves.evaluated == evaluated
    layout = point.found.layout()
    alone = simulate(LayoutCost(group_cost(curves.inputs, Group.of(layout, [list(range(8))])), layout)).seconds
    assert alone <= point.seconds * (1 + 1e-9)  # one group: with the all-reduce of its own


def test_no_point_where_memory_holds_no_layout() -> None:
    curves = Curves(fleet(memory=1_400_000), 16, None)
    assert curves.point((1, 0), 4) is None
    assert curves.known((1, 0)) == []
    assert curves.refused() == {((1, 0), 4)}


def test_gathers_of_a_sharded_dense_part_take_the_bandwidth_of_all_reduces() -> None:
    """As in CostModel.sharding_seconds, whose part in a large group the estimate stands for."""

    def gathered(link: Link) -> float:
        inputs = fleet()
        nodes = [group.model_copy(update={"network": link}) for group in inputs.cluster.nodes]
        inputs = inputs.model_copy(update={"cluster": inputs.cluster.model_copy(update={"nodes": nodes})})
        curves, shares = Curves(inputs, 16, None), [Share(0, 4, 2), Share(1, 4, 2)]
        part = curves.part((4, 4), 1)
        whole, sharded = (
            estimate(part, curves.kernels, ScheduleChoice(micro_batches=1, window=1, dense_state=state), shares).seconds
            for state in ("optimizer", "full")
        )
        return sharded - whole

    usual = Link(bandwidth_gigabytes_per_second=1.0, latency_microseconds=20.0)
    faster = usual.model_copy(update={"all_reduce_gigabytes_per_second": 4.0})
    assert gathered(usual) > 0
    assert gathered(faster) == pytest.approx(gathered(usual) / 4)


@pytest.mark.parametrize("state", ["optimizer", "full", "replicated"])
def test_costs_of_one_of_several_groups_know_what_the_others_hold(state: DenseState) -> None:
    """Memory and optimizer step are those of the replay of all groups, if they are alike."""
    inputs = fleet([("new", 4, 2)], batch=16, dense_state=state)
    layout = make_layout((1, 1), (3, 4), replicated=1, micro_batches=2, dense_state=state)
    group = Group.of(layout, [[0, 1], [2, 3], [4, 5], [6, 7]])
    (replayed,) = replay_groups(inputs, [group]).groups
    among = LayoutCost(CostModel(group_inputs(inputs, [0, 1], 4), 4), layout)
    assert [among.memory(rank) for rank in range(2)] == replayed.memory
    assert max(among.seconds(rank, OPTIMIZER) for rank in range(2)) == pytest.approx(replayed.optimizer)
    assert replayed.fits
    alone = LayoutCost(CostModel(group_inputs(inputs, [0, 1], 4)), layout)
    more = alone.memory(0).optimizer_bytes / among.memory(0).optimizer_bytes
    assert more == 1 if state == "replicated" else more > 2


def test_a_point_that_took_groups_for_more_than_there_are_is_looked_for_again() -> None:
    inputs = fleet([("new", 4, 2)], batch=32, dense_state="optimizer")
    curves = Curves(inputs, 16, 8)
    point = curves.point((2,), 8)
    assert point is not None
    assert point.groups == 4
    curves.refuse((2,), 8, 2)
    again = curves.point((2,), 8)
    assert again is not None
    assert again.groups == 2
    curves.refuse((2,), 8, 2)
    assert curves.point((2,), 8) is None


def test_states_that_unlike_groups_share_out_are_known_where_a_group_would_not_fit_else() -> None:
    """One group in each of two nodes of other devices: neither alone holds all optimizer states of its copy."""
    nodes = [("new", 1, 4), ("old", 1, 4)]
    points = [
        Curves(fleet(nodes, memory=memory, dense_state="optimizer"), 16, None).point((4, 0), 8)
        for memory in (4_000_000, 5_000_000, 6_000_000)
    ]
    assert [point and point.groups for point in points] == [None, 2, 1]
    assert Curves(fleet(nodes, memory=5_000_000, dense_state="optimizer"), 16, 1).point((4, 0), 8) is None


def test_a_point_that_took_groups_for_fewer_than_there_are_may_get_better() -> None:
    """Optimizer states that others hold leave room, so that nothing need run again."""
    curves = Curves(fleet([("new", 1, 4), ("old", 1, 4)], memory=6_000_000, dense_state="optimizer"), 16, None)
    alone = curves.point((4, 0), 8)
    assert alone is not None
    assert curves.reconsider((4, 0), 8, 2)
    among = curves.point((4, 0), 8)
    assert among is not None
    assert among.seconds < alone.seconds
    assert not curves.reconsider((4, 0), 8, 2)
