"""The rivals as their modules define them, on figures worked out by hand."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from builders import make_inputs, make_layout, make_model, make_profile, sequential
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.allowed import kept_choices, recompute_choices
from hetermoe_cli.planner.baselines.even import ep, even_placement, hetero_ep
from hetermoe_cli.planner.baselines.methods import RIVALS
from hetermoe_cli.planner.baselines.roles import (
    Roles,
    chunks_of,
    dist_ep,
    find_roles,
    gather_squeeze,
    offloaded,
    split_layout,
)
from hetermoe_cli.planner.instance.deal import proportional
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.report.plan_table import RIVAL_NAMES
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.schedule_choice import ScheduleChoice
from hetermoe_cli.spec.train import TrainSpec


def inputs(news: int, olds: int, *, experts: int, batch: int, layers: int = 4, attention: float = 1.0) -> Inputs:
    """Expert rows cost 0.01 s on "new" and 0.02 s on "old"; 64 tokens a sequence, top-1."""
    model = make_model(layers=layers, experts=experts, top_k=1)
    profiles = {
        "new": make_profile("new", model=model, attention_seconds=attention, expert_seconds=0.01),
        "old": make_profile("old", model=model, attention_seconds=8.0, expert_seconds=0.02),
    }
    nodes = [("new", 1)] * news + [("old", 1)] * olds
    return make_inputs(nodes, model=model, profiles=profiles, global_batch_sequences=batch)


def replay(cost: CostModel, layout: Layout) -> float:
    """Seconds, infinite if it does not fit."""
    layout_cost = LayoutCost(cost, layout)
    return inf if overflow(layout_cost) else simulate(layout_cost).seconds


def every_schedule(batch: int) -> list[ScheduleChoice]:
    """All R and windows, without recompute."""
    return [
        ScheduleChoice(micro_batches=count, window=width)
        for count in range(1, batch + 1)
        for width in range(1, count + 1)
        if batch % count == 0 and count % width == 0
    ]


def less_memory(base: Inputs, device: str, size: int) -> CostModel:
    """The same without recompute, and with `size` bytes on every device of a type."""
    small = base.profiles[device].model_copy(update={"memory_bytes": size})
    train = base.train.model_copy(update={"recompute": "none"})
    return CostModel(base.model_copy(update={"profiles": {**base.profiles, device: small}, "train": train}))


def test_every_rival_has_a_name_in_the_table() -> None:
    assert set(RIVALS) == set(RIVAL_NAMES)


def test_ep_is_even_in_sequences_and_experts() -> None:
    layout = ep(CostModel(inputs(2, 2, experts=6, batch=8)), 16).layout
    assert layout is not None
    assert max(layout.sequences_per_rank) - min(layout.sequences_per_rank) <= 1
    for placement in layout.placement:
        sizes = [len(experts) for experts in placement.experts]
        assert sorted(sizes) == [1, 1, 2, 2]
        assert not placement.replicated
    held = [sum(len(p.experts[rank]) for p in layout.placement) for rank in range(4)]
    assert max(held) - min(held) <= 1


def test_ep_leaves_no_device_without_sequences_where_it_can() -> None:
    layout = ep(CostModel(inputs(2, 2, experts=4, batch=8)), 16).layout
    assert layout is not None
    assert min(layout.sequences_per_rank) > 0


def test_ep_is_even_over_an_iteration_where_the_batch_divides() -> None:
    # R = 3 would give 16 sequences to 4 devices of 12 twice, and be faster: the first four are the fast ones
    layout = ep(CostModel(inputs(4, 8, experts=12, batch=48)), 16).layout
    assert layout is not None
    assert len(set(layout.sequences_per_rank)) == 1


@pytest.mark.parametrize("size", [10**10, 9_000_000, 7_600_000])
def test_ep_is_the_fastest_of_its_layouts(size: int) -> None:
    cost = less_memory(inputs(2, 2, experts=4, batch=16), "old", size)
    even = [
        Layout(schedule=s, sequences_per_rank=[4 // s.micro_batches] * 4, placement=even_placement(cost))
        for s in every_schedule(16)
        if 4 % s.micro_batches == 0
    ]
    assert ep(cost, 16).seconds == pytest.approx(min(replay(cost, layout) for layout in even))


def test_ep_takes_windows_where_memory_needs_them_and_has_a_reason_where_nothing_fits() -> None:
    base = inputs(2, 2, experts=4, batch=16)
    found = [ep(less_memory(base, "old", size), 16) for size in range(4_000_000, 10_000_000, 100_000)]
    names = [rival.layout.schedule.name for rival in found if rival.layout]
    assert {"zebra", "windowed"} <= set(names)
    assert found[0].layout is None
    assert found[0].reason.startswith("does not fit: rank")


def test_dist_ep_splits_roles_and_overlaps_nothing() -> None:
    cost = CostModel(inputs(2, 2, experts=4, batch=8))
    rival = dist_ep(cost, 16)
    assert rival.layout is not None
    assert rival.layout.schedule == sequential(1)
    assert rival.layout.sequences_per_rank == [4, 4, 0, 0]
    assert [len(experts) for experts in rival.layout.placement[0].experts] == [0, 0, 2, 2]
    assert rival.seconds == simulate(LayoutCost(cost, rival.layout)).seconds


@pytest.mark.parametrize("size", [10**10, 8_000_000, 7_000_000])
def test_gather_squeeze_is_the_fastest_of_its_layouts(size: int) -> None:
    cost = less_memory(inputs(2, 2, experts=8, batch=16), "old", size)
    roles = find_roles(cost)
    assert roles is not None
    layouts = [split_layout(cost, roles, s, offloaded(cost, roles, s)) for s in every_schedule(16)]
    assert gather_squeeze(cost, 16).seconds == pytest.approx(min(replay(cost, layout) for layout in layouts))


def test_without_asymmetry_attending_devices_host_nothing() -> None:
    layout = gather_squeeze(CostModel(inputs(2, 2, experts=8, batch=8)), 16, asymmetric=False).layout
    assert layout is not None
    assert not any(p.experts[0] or p.experts[1] for p in layout.placement)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.lists(st.floats(0.01, 10), min_size=1, max_size=40))
def test_proportional_shares_are_whole_and_add_up(totals: list[int], speeds: list[float]) -> None:
    """Also where devices are many more than experts, so that some are owed less than nothing."""
    for total, share in zip(totals, proportional(totals, speeds), strict=True):
        assert sum(share) == total
        assert min(share) >= 0


def test_debts_of_many_slow_devices_never_make_a_share_negative() -> None:
    speeds = [(1.0, 0.37, 0.05, 1 / 3)[(7 * i) % 4] for i in range(257)]
    assert min(min(share) for share in proportional([8] * 94, speeds)) == 0


def test_proportional_shares_carry_what_they_round_off() -> None:
    assert proportional([4], [3.0, 1.0]) == [[3, 1]]
    assert proportional([1, 1, 1], [2.0, 1.0]) == [[1, 0], [0, 1], [1, 0]]
    assert proportional([5], [1.0, 1.0]) == [[3, 2]]
    for totals, speeds in (([7, 7, 7, 7], [5.0, 2.0, 2.0]), ([3] * 10, [1.0] * 7), ([0, 2, 9], [0.1, 4.0])):
        shares = proportional(totals, speeds)
        assert [sum(share) for share in shares] == totals
        for place, speed in enumerate(speeds):
            wanted = sum(totals) * speed / sum(speeds)
            assert abs(sum(share[place] for share in shares) - wanted) < 1 + 1e-9


def test_hetero_ep_shares_by_speed() -> None:
    # Attention of 4 layers and head, forward and backward: new 3 x (4 + 64 x 0.005) s, old 8 times the former.
    cost = CostModel(inputs(2, 2, experts=6, batch=18))
    layout = hetero_ep(cost, 1).layout
    assert layout is not None
    assert layout.sequences_per_rank == [8, 8, 1, 1]
    for placement in layout.placement:
        assert [len(experts) for experts in placement.experts] == [2, 2, 1, 1]


def test_algorithm_1_by_hand() -> None:
    # R = 2: 4 sequences a micro-batch, 256 rows, 32 an expert; M = N = 2, so n1 = n2 = 1.
    # T_A = 2 sequences x 1 s = 2; T_EE = 4 experts x 32 x 0.02 = 2.56; T_EA = 1.28; T_gather = 0.56.
    # T_squeeze = (2.56 + 1.28) x 2 / 8 = 0.96: t = 0.56, 1.12, 0.72, 1.28 -> chunks 0, 1, 0, 1 of 1 x N experts.
    cost = CostModel(inputs(2, 2, experts=8, batch=8))
    schedule = ScheduleChoice.zebra(2)
    assert offloaded(cost, Roles([0, 1], [2, 3]), schedule) == [0, 2, 0, 2]


def test_nothing_is_offloaded_where_counts_do_not_divide_or_attention_is_slower() -> None:
    schedule = ScheduleChoice.zebra(2)
    uneven = CostModel(inputs(2, 3, experts=8, batch=8))
    assert offloaded(uneven, Roles([0, 1], [2, 3, 4]), schedule) == [0] * 4
    slow = CostModel(inputs(2, 2, experts=8, batch=8, attention=7.0))
    assert offloaded(slow, Roles([0, 1], [2, 3]), schedule) == [0] * 4


def test_chunks_carry_over_and_are_limited() -> None:
    assert chunks_of(0.56, 0.96, 4, 9) == [0, 1, 0, 1]
    assert chunks_of(3.0, 1.0, 3, 2) == [2, 2, 2]


def test_gather_squeeze_gives_back_all_that_hosts_cannot_hold() -> None:
    base = inputs(1, 1, experts=8, batch=4, layers=2, attention=7.0)
    small = base.profiles["old"].model_copy(update={"memory_bytes": 7_000_000})
    cost = CostModel(base.model_copy(update={"profiles": {**base.profiles, "old": small}}))
    rival = gather_squeeze(cost, 16)
    assert rival.layout is not None
    assert overflow(LayoutCost(cost, rival.layout)) is None
    assert sum(len(p.experts[0]) for p in rival.layout.placement) > 0


@pytest.mark.parametrize("rival", [dist_ep, gather_squeeze])
def test_one_type_has_no_roles(rival: object) -> None:
    found = rival(CostModel(inputs(2, 0, experts=4, batch=4)), 16)  # type: ignore[operator]
    assert found.layout is None
    assert found.baseline().iteration_seconds is None
    assert "one device type" in found.reason


def test_rows_are_sent_again_where_tokens_have_many_choices_or_the_spec_says_so() -> None:
    few, many = (make_inputs(model=make_model(experts=4, top_k=k)) for k in (2, 3))
    assert "full" not in recompute_choices(CostModel(few))
    assert "full" in recompute_choices(CostModel(many))
    asked = few.with_train(recompute="full")
    assert recompute_choices(CostModel(asked)) == ["full"]
    either = many.train.model_copy(update={"dense_state": "auto"})
    pairs = kept_choices(CostModel(many.model_copy(update={"train": either})))
    assert {("full", "optimizer"), ("all", "full")} < set(pairs)
    assert ("full", "full") not in pairs


def test_full_recompute_is_refused_with_what_it_does_not_go_with() -> None:
    given = make_inputs(model=make_model(experts=4, top_k=3, dense_layers=1, dense_ffn_size=96))
    asked = given.with_train(recompute="full")
    with pytest.raises(ValidationError, match="not with dense_state full"):
        TrainSpec.model_validate({**asked.train.model_dump(), "dense_state": "full"})
    with pytest.raises(ValidationError, match="not with dense_state full"):
        make_layout(recompute="full", dense_state="full")
