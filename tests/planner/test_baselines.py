"""The rivals as planner.md and section 3 of paper.md define them, on figures worked out by hand."""

import pytest

from builders import make_inputs, make_model, make_profile
from hetermoe_cli.cost import CostModel, LayoutCost
from hetermoe_cli.planner.baselines import Roles, _chunks, dist_ep, ep, gather_squeeze, offloaded
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.plan import Inputs, ScheduleChoice


def inputs(news: int, olds: int, *, experts: int, batch: int, layers: int = 4, attention: float = 1.0) -> Inputs:
    """Expert rows cost 0.01 s on "new" and 0.02 s on "old"; 64 tokens a sequence, top-1."""
    model = make_model(layers=layers, experts=experts, top_k=1)
    profiles = {
        "new": make_profile("new", model=model, attention_seconds=attention, expert_seconds=0.01),
        "old": make_profile("old", model=model, attention_seconds=8.0, expert_seconds=0.02),
    }
    nodes = [("new", 1)] * news + [("old", 1)] * olds
    return make_inputs(nodes, model=model, profiles=profiles, global_batch_sequences=batch)


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


def test_dist_ep_splits_roles_and_overlaps_nothing() -> None:
    cost = CostModel(inputs(2, 2, experts=4, batch=8))
    rival = dist_ep(cost, 16)
    assert rival.layout is not None
    assert rival.layout.schedule == ScheduleChoice.sequential(1)
    assert rival.layout.sequences_per_rank == [4, 4, 0, 0]
    assert [len(experts) for experts in rival.layout.placement[0].experts] == [0, 0, 2, 2]
    assert rival.seconds == simulate(LayoutCost(cost, rival.layout)).seconds


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
    assert _chunks(0.56, 0.96, 4, 9) == [0, 1, 0, 1]
    assert _chunks(3.0, 1.0, 3, 2) == [2, 2, 2]


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
