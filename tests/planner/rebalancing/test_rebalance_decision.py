"""Whether experts move: not when balanced, when skewed, not when it does not pay, never beyond memory."""

import itertools
from collections.abc import Sequence
from math import inf

import numpy as np
import pytest

from builders import make_groups_plan, make_inputs, make_layout, make_model, make_plan, make_profile
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.measured import MeasuredCost, MeasuredState
from hetermoe_cli.cost.moving import holders, moves, moving_seconds, state_bytes
from hetermoe_cli.planner.cluster.replayed import replay_measured
from hetermoe_cli.planner.rebalancing import rebalance
from hetermoe_cli.planner.rebalancing.group_moves import Search, kinds_of, renumbered, search
from hetermoe_cli.planner.rebalancing.rebalance import NOT_FASTER, UNSTEADY
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import LayerPlacement, Layout, PipelineStage
from hetermoe_cli.spec.load import ExpertLoad
from hetermoe_cli.spec.plan import Group, Plan
from hetermoe_cli.spec.rebalance import Decision

EXPERTS, LAYERS = 8, 2
MODEL = make_model(layers=LAYERS, experts=EXPERTS, top_k=1)
LAYOUT = make_layout((1, 1, 0, 0), (0, 0, 4, 4), layers=LAYERS, micro_batches=2)
Rows = list[list[float]] | None
SKEWED = [[6, 6, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 6, 6]]


def inputs(*, gigabytes_per_second: float = 1.0, memory_bytes: int = 10**10) -> Inputs:
    """Two attending ranks and two that host, which the experts keep busy most of the time."""
    profile = make_profile(
        model=MODEL,
        attention_seconds=0.05,
        expert_seconds=0.005,
        optimizer_seconds_per_parameter=1e-9,
        memory_bytes=memory_bytes,
    )
    link = Link(bandwidth_gigabytes_per_second=gigabytes_per_second, latency_microseconds=0.0)
    return make_inputs(
        (("new", 4),),
        model=MODEL,
        profiles={"new": profile},
        global_batch_sequences=4,
        network=link,
        interconnect=link,
    )


def cost(load: Rows, slowdown: tuple[float, ...] = (1, 1, 1, 1), **given: float) -> MeasuredCost:
    return MeasuredCost(inputs(**given), ExpertLoad(layers=load) if load else None, slowdown)  # type: ignore[arg-type]


def decide(
    load: Rows,
    steps: int,
    *,
    layout: Layout = LAYOUT,
    slowdown: Sequence[float] = (1, 1, 1, 1),
    earlier: Sequence[Rows] = (),
    **given: float,
) -> Decision:
    """Where to go from the plan's `layout`; under a steady load unless it was another one `earlier`."""
    plan = make_plan(inputs(**given), layout)  # type: ignore[arg-type]
    now, then = (
        MeasuredState(ExpertLoad(layers=rows) if rows else None, slowdown) for rows in (load, *(earlier or [load]))
    )
    return rebalance.decide(plan, plan.groups, now, then, steps)


def placed(layout: Layout, decision: Decision) -> Layout:
    """The only group's layout after the move."""
    assert decision.groups is not None
    (group,) = decision.groups
    assert group.layout == layout.model_copy(update={"placement": group.placement})
    return group.layout


def test_nothing_moves_under_the_load_that_was_assumed() -> None:
    for load in (None, [[1.0] * EXPERTS] * LAYERS):
        decision = decide(load, 1000)
        assert decision.groups is None
        assert decision.moved == decision.move_seconds == 0
        assert "no placement is predicted to be clearly faster" in decision.reason


def test_a_skewed_load_moves_experts_and_its_replay_is_faster() -> None:
    measured = cost(SKEWED)
    decision = decide(SKEWED, 1000)
    found = placed(LAYOUT, decision)
    assert decision.before_seconds == pytest.approx(simulate(LayoutCost(measured, LAYOUT)).seconds)
    assert decision.after_seconds == pytest.approx(simulate(LayoutCost(measured, found)).seconds)
    even = simulate(LayoutCost(cost(None), LAYOUT)).seconds
    assert decision.after_seconds <= even * (1 + 1e-9) < 0.92 * decision.before_seconds
    assert decision.moved == sum(len(move.targets) for move in moves(LAYOUT, found)) > 0
    assert decision.move_seconds == moving_seconds(measured, LAYOUT, found)


STAGES = Layout(
    schedule=LAYOUT.schedule,
    sequences_per_rank=[1, 1, 1, 1],
    placement=[
        LayerPlacement(experts=[[0, 1, 2, 3], [4, 5, 6, 7], [], []]),
        LayerPlacement(experts=[[], [], [0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
    pipeline=[PipelineStage(layers=1, ranks=[0, 1]), PipelineStage(layers=1, ranks=[2, 3])],
)


def test_experts_move_inside_their_pipeline_stage() -> None:
    decision = decide(SKEWED, 1000, layout=STAGES)
    found = placed(STAGES, decision)  # a Layout checks that stages host what is theirs
    assert decision.before_seconds == pytest.approx(simulate(LayoutCost(cost(SKEWED), STAGES)).seconds)
    assert decision.after_seconds == pytest.approx(simulate(LayoutCost(cost(SKEWED), found)).seconds)
    assert decision.after_seconds < 0.9 * decision.before_seconds


def test_moving_must_pay_in_the_steps_that_are_left() -> None:
    many, few = (decide(SKEWED, steps, gigabytes_per_second=1e-3) for steps in (10_000, 1))
    assert many.groups is not None
    gain = many.before_seconds - many.after_seconds
    assert gain < many.move_seconds < gain * 10_000
    assert few.groups is None
    assert "moving takes longer" in few.reason


def test_few_steps_left_move_fewer_experts() -> None:
    moved = [decide(SKEWED, steps, gigabytes_per_second=1e-3).moved for steps in (1, 20, 10_000)]
    assert moved == sorted(moved)
    assert moved[0] < moved[-1]


def test_a_load_that_moves_on_moves_no_expert() -> None:
    """Some steps ago both hosts had as much to do: what was there was best."""
    assert decide(SKEWED, 1000).groups is not None
    for earlier in (None, [[6.0, 1, 1, 1, 6, 1, 1, 1]] * LAYERS):
        assert decide(SKEWED, 1000, earlier=[earlier]).reason == UNSTEADY


def test_a_slow_device_gives_experts_away() -> None:
    found = placed(LAYOUT, decide(None, 1000, slowdown=(1, 1, 1, 2)))
    counts = np.sum([[len(experts) for experts in placement.experts] for placement in found.placement], axis=0)
    assert counts[3] < counts[2]


def test_only_what_fits_into_memory() -> None:
    """The measured load leaves room for little more than what is there."""
    wide = cost(SKEWED)
    needed = max(LayoutCost(wide, LAYOUT).memory(rank).total_bytes for rank in range(4))
    room = int(needed / wide.train.memory_headroom) + 2
    decision = decide(SKEWED, 1000, memory_bytes=room)
    if decision.groups is not None:
        assert overflow(LayoutCost(cost(SKEWED, memory_bytes=room), placed(LAYOUT, decision))) is None
    assert "no placement fits into memory" in decide(SKEWED, 1000, memory_bytes=int(needed / 20)).reason


def test_what_does_not_fit_moves_even_without_a_gain() -> None:
    """All experts on one rank: the plan's balanced prediction is of no use under a load that overflows it."""
    crowded = make_layout((1, 1, 0, 0), (0, 0, 8, 0), layers=LAYERS, micro_batches=2)
    roomy = cost(None)
    needed = [LayoutCost(roomy, layout).memory(2).total_bytes for layout in (crowded, LAYOUT)]
    even, room = [[1.0] * EXPERTS] * LAYERS, int(sum(needed) / 2 / roomy.train.memory_headroom)
    tight = cost(even, memory_bytes=room)
    assert overflow(LayoutCost(tight, crowded))
    decision = decide(even, 1, layout=crowded, memory_bytes=room)
    assert overflow(LayoutCost(tight, placed(crowded, decision))) is None


def test_every_change_of_a_layer_is_tried_while_nothing_fits() -> None:
    tight, tried = cost(SKEWED, memory_bytes=1000), []

    def cost_of(layout: Layout) -> LayoutCost:
        tried.append([new != old for new, old in zip(layout.placement, LAYOUT.placement, strict=True)])
        return LayoutCost(tight, layout)

    found = Search(cost_of, LAYOUT, 1, inf)
    search(found, LAYOUT)
    assert found.layout is None
    assert tried.count([True, False]) > 1
    assert tried.count([False, True]) > 1


def groups_plan(*, small: float = 1.0, **given: float) -> Plan:
    """Two equal groups of four, and one of three devices with half the sequences, whose experts are slower by
    `small`."""
    slow = make_profile("slow", model=MODEL, attention_seconds=0.05, expert_seconds=0.01 * small)
    base = inputs(**given)  # type: ignore[arg-type]
    profiles = {"new": base.profiles["new"], "slow": slow}
    link = base.cluster.nodes[0].network
    made = make_inputs((("new", 4), ("new", 4), ("slow", 3)), model=MODEL, profiles=profiles, global_batch_sequences=10,
                       network=link, interconnect=link)  # fmt: skip
    pair = make_layout((1, 0, 0), (0, 4, 4), layers=LAYERS, micro_batches=2)
    return make_groups_plan(made, (LAYOUT, [[0, 1, 2, 3], [4, 5, 6, 7]]), (pair, [[8, 9, 10]]))


def with_one_alone(**given: float) -> Plan:
    """The third group is a single device that holds all experts."""
    made = groups_plan(**given).inputs
    nodes = [*made.cluster.nodes[:2], made.cluster.nodes[2].model_copy(update={"devices": 1})]
    cluster = made.cluster.model_copy(update={"nodes": nodes})
    alone = make_layout((1,), (8,), layers=LAYERS, micro_batches=2)
    replicas = [[0, 1, 2, 3], [4, 5, 6, 7]]
    return make_groups_plan(made.model_copy(update={"cluster": cluster}), (LAYOUT, replicas), (alone, [[8]]))


def decide_groups(plan: Plan, load: Rows, slowdown: Sequence[float] = (), steps: int = 1000) -> Decision:
    state = MeasuredState(ExpertLoad(layers=load) if load else None, slowdown or (1,) * plan.inputs.cluster.world_size)
    return rebalance.decide(plan, plan.groups, state, state, steps)


def test_all_groups_move_where_all_are_slow() -> None:
    plan = groups_plan()
    decision = decide_groups(plan, SKEWED)
    assert decision.groups is not None
    assert [group.replicas for group in decision.groups] == [group.replicas for group in plan.groups]
    state = MeasuredState(ExpertLoad(layers=SKEWED), (1,) * 11)
    before, after = (replay_measured(plan.inputs, groups, state) for groups in (plan.groups, decision.groups))
    assert decision.before_seconds == pytest.approx(before.seconds)
    assert decision.after_seconds == pytest.approx(after.seconds)
    assert decision.after_seconds < 0.95 * decision.before_seconds
    moved = [len(list(moves(old.layout, new.layout))) for old, new in zip(plan.groups, decision.groups, strict=True)]
    assert all(moved)
    assert decision.moved == 2 * moved[0] + moved[1]  # both replicas move theirs
    assert before.copies == [0, 0, 1]


def test_a_group_that_others_wait_for_moves_alone() -> None:
    """Where the small one is much faster, its experts stay; where it is much slower, only its experts move."""
    for small, stays in ((0.25, 1), (4.0, 0)):
        plan = groups_plan(small=small)
        decision = decide_groups(plan, SKEWED)
        assert decision.groups is not None
        assert [new == old for new, old in zip(decision.groups, plan.groups, strict=True)] == [stays == 0, stays == 1]


def test_groups_beside_pipeline_stages_move_theirs() -> None:
    plan = groups_plan(small=4.0)
    groups = [Group.of(STAGES, plan.groups[0].replicas), plan.groups[1]]
    state = MeasuredState(ExpertLoad(layers=SKEWED), (1,) * 11)
    found = rebalance._search(plan, replay_measured(plan.inputs, groups, state), 1000).layouts
    assert found[0] == STAGES
    assert found[1] != plan.groups[1].layout


def test_replicas_come_to_differ_where_their_devices_do() -> None:
    """One replica's last host is slow, the other's first: they give experts away in opposite directions."""
    plan = groups_plan(small=0.25)
    decision = decide_groups(plan, None, (1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1))
    assert decision.groups is not None
    assert [group.replicas for group in decision.groups] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10]]]
    held = [np.sum([list(map(len, p.experts)) for p in group.placement], axis=0) for group in decision.groups]
    assert held[0][2] > held[0][3]
    assert held[1][2] < held[1][3]
    state = MeasuredState(None, (1,) * 11)  # speeds are as profiled again
    back = rebalance.decide(plan, decision.groups, state, state, 1000)
    assert back.groups is not None
    copies = [ranks for group in back.groups for ranks in group.replicas]
    assert copies == [list(replica.processes) for replica in plan.world.replicas]


def test_what_gains_nothing_for_the_slowest_group_moves_nothing() -> None:
    """The slowest one is a single device: no other group's move shortens the iteration."""
    decision = decide_groups(with_one_alone(small=8.0), SKEWED)
    assert decision.groups is None
    assert decision.reason == NOT_FASTER


def test_moving_pays_for_the_iteration_of_all_groups_not_for_one() -> None:
    """On a slow network moved experts take longer to sum over groups, so that all gain less than a group by itself."""
    plan = with_one_alone(small=0.25, gigabytes_per_second=1e-3)
    for steps in (5, 6, 7, 100):
        decision = decide_groups(plan, SKEWED, steps=steps)
        gain = (decision.before_seconds - decision.after_seconds) * steps
        assert gain > decision.move_seconds or decision.groups is None
    assert decision.groups is not None  # 100 steps are enough


def test_moves_go_from_a_holder_to_those_that_lack_the_expert() -> None:
    before = Layout(
        schedule=LAYOUT.schedule,
        sequences_per_rank=[1, 1, 0, 0],
        placement=[LayerPlacement(experts=[[], [0], [1], []], replicated=[2])],
    )
    after = before.model_copy(
        update={"placement": [LayerPlacement(experts=[[], [], [], [2, 0]], replicated=[1])]},
    )
    assert holders(before, 0) == {0: {1}, 1: {2}, 2: {0, 1}}
    found = [(move.expert, move.source, move.targets) for move in moves(before, after)]
    assert found == [(0, 1, (3,)), (1, 2, (0, 1)), (2, 0, (3,))]
    assert not list(moves(before, before))


def test_moving_seconds_are_those_of_the_busiest_link() -> None:
    """Ranks 2 and 3 swap two experts of a layer: each sends two, at 1 GB/s, in both directions at once."""
    measured = cost(None)
    swapped = make_layout((1, 1, 0, 0), (0, 0, 4, 4), layers=LAYERS, micro_batches=2)
    other = LayerPlacement(experts=[[], [], [0, 1, 4, 5], [2, 3, 6, 7]])
    swapped = swapped.model_copy(update={"placement": [other, LAYOUT.placement[1]]})
    assert state_bytes(measured) == 12 * MODEL.expert_parameters
    assert moving_seconds(measured, LAYOUT, swapped) == pytest.approx(2 * state_bytes(measured) / 1e9)


def test_equal_ranks_keep_the_bundles_that_they_have() -> None:
    swapped = LayerPlacement(experts=[[], [], [4, 5, 6, 7], [0, 1, 2, 3]])
    layout = LAYOUT.model_copy(update={"placement": [swapped] * LAYERS})
    assert renumbered(layout, LAYOUT, [[0, 1], [2, 3]]) == LAYOUT
    assert renumbered(layout, LAYOUT, [[0, 1], [2], [3]]) == layout


def test_ranks_on_more_shifts_or_with_more_of_the_head_have_less_time_for_experts() -> None:
    layout = make_layout((1, 1, 1, 0), (0, 0, 4, 4), layers=LAYERS, micro_batches=4)
    found = cost(None)
    assert kinds_of(found, layout) == [[0, 1, 2], [3]]
    shifts = [[0, 1, 2, 3], [0, 1, 3], [2], []]
    assert kinds_of(found, Layout.model_validate(layout.model_dump() | {"shifts": shifts})) == [[0], [1], [2], [3]]
    assert kinds_of(found, layout.model_copy(update={"head": [1, 2, 1, 4]})) == [[0, 2], [1], [3]]


def test_renumbering_only_exchanges_bundles() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        hosts = random.integers(0, 4, (2, EXPERTS))
        current, new = (
            LayerPlacement(experts=[np.flatnonzero(row == rank).tolist() for rank in range(4)]) for row in hosts
        )
        layouts = [LAYOUT.model_copy(update={"placement": [p, p]}) for p in (current, new)]
        found = renumbered(layouts[1], layouts[0], [[0, 1], [2, 3]])
        for pair in ((0, 1), (2, 3)):
            bundles = [sorted(placement.experts[rank] for rank in pair) for placement in (found.placement[0], new)]
            assert bundles[0] == bundles[1]
        given, *others = (
            len(list(moves(layouts[0], layouts[1].model_copy(update={"placement": [exchange(new, a, b)] * 2}))))
            for a, b in itertools.product((False, True), repeat=2)
        )
        moved = len(list(moves(layouts[0], found)))
        most = 2 * EXPERTS
        assert most - moved >= (most - min(given, *others)) / 2  # half of the best is what a greedy choice is sure of


def exchange(placement: LayerPlacement, first: bool, second: bool) -> LayerPlacement:
    a, b, c, d = placement.experts
    return LayerPlacement(experts=[*((b, a) if first else (a, b)), *((d, c) if second else (c, d))])
