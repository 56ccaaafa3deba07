"""make_plan with several groups: legal, replayed, bounded; objectives; what cannot be planned."""

from math import inf
from typing import Any

import pytest
from cluster_builders import fleet

from builders import make_inputs, make_layout, make_model, make_profile
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.bounds.work import work_bound
from hetermoe_cli.planner.cluster.bound import groups_bound
from hetermoe_cli.planner.cluster.groups import FoundGroups, GroupSearch, may_split
from hetermoe_cli.planner.cluster.objective import Wanted, least_dollars
from hetermoe_cli.planner.cluster.plan_groups import _of_one_state
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.planner.pipelines.plan_pipelines import PipelineSearch
from hetermoe_cli.planner.plan import PlanOptions, make_plan
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.plan import Group, Plan

SLOW = 1e-3  # GB/s: rows that leave a node take long
PRICED = {"nodes": [("new", 2, 2), ("old", 2, 2)], "prices": [3.0, 1.0]}


def planned(inputs: Inputs, time_limit: float = 1.0, **wanted: Any) -> Plan:
    options = PlanOptions(solver=SolverOptions(time_limit=time_limit), wanted=Wanted(**wanted))
    plan = make_plan(inputs, options)
    check(plan)
    return plan


def check(plan: Plan) -> None:
    """A plan of groups is what its replay says, within memory and above every bound."""
    seconds, world = plan.predicted.iteration_seconds, plan.inputs.cluster.world_size
    assert seconds == pytest.approx(replay_groups(plan.inputs, plan.groups).seconds)
    used = {rank for group in plan.groups for ranks in group.replicas for rank in ranks}
    assert len(plan.memory) == len(plan.predicted.busy_share_per_rank) == world
    for rank, (memory, busy) in enumerate(zip(plan.memory, plan.predicted.busy_share_per_rank, strict=True)):
        assert memory.total_bytes <= memory.capacity_bytes * plan.inputs.train.memory_headroom
        assert 0 <= busy <= 1
        if rank not in used:
            assert (memory.total_bytes, busy) == (0, 0.0)
    assert plan.bound.work_iteration_seconds <= seconds
    assert plan.bound.iteration_seconds <= seconds * (1 + 1e-9)
    assert plan.gap == pytest.approx(max(0.0, 1 - plan.bound.iteration_seconds / seconds), abs=1e-9)
    assert plan.group_count <= (plan.max_groups or inf)
    Plan.model_validate(plan.model_dump())


def test_more_devices_than_experts_are_better_off_in_several_groups() -> None:
    inputs = fleet([("new", 12, 2)], memory=4_500_000, dense_state="auto", batch=48)  # room for 3 of 16 experts
    plan = planned(inputs)
    assert plan.group_count > 1
    assert plan.max_groups is None
    one = planned(inputs, most_groups=1)
    assert one.layout.world_size == 24
    assert plan.predicted.iteration_seconds < one.predicted.iteration_seconds
    with pytest.raises(UserError, match=r"field groups: \d+ of them, this works on one"):
        plan.check_one_group("plan.yaml")


def test_types_that_share_no_fast_link_share_the_batch_by_speed() -> None:
    plan = planned(fleet([("new", 1, 2), ("old", 1, 2)], bandwidth=SLOW, batch=20, layers=4), most_groups=2)
    by_start = sorted(plan.groups, key=lambda group: group.replicas[0])
    if plan.group_count == 2:
        fast, slow = by_start
        assert fast.sequences > slow.sequences
    assert plan.max_groups == 2


def two_nodes(bandwidth: float, batch: int) -> Inputs:
    """Four devices each, that share a NIC of so many GB/s."""
    inputs = fleet([("new", 2, 4)], batch=batch, nics=1)
    slow = Link(bandwidth_gigabytes_per_second=bandwidth, latency_microseconds=20.0)
    nodes = [group.model_copy(update={"network": slow}) for group in inputs.cluster.nodes]
    return inputs.model_copy(update={"cluster": inputs.cluster.model_copy(update={"nodes": nodes})})


def test_small_clusters_have_one_group_where_several_are_not_faster() -> None:
    """Gradients of a whole model take longer than rows."""
    inputs = two_nodes(10 * SLOW, batch=64)
    assert may_split(CostModel(inputs), 16, Wanted())
    plan, one = planned(inputs), planned(inputs, most_groups=1)
    assert plan.layout.world_size == 8
    assert plan.max_groups == 1
    assert plan.predicted.iteration_seconds == pytest.approx(one.predicted.iteration_seconds, rel=0.02)


@pytest.mark.long
def test_small_clusters_have_several_groups_where_rows_take_longer_than_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = two_nodes(SLOW, batch=128)
    best = planned(inputs)
    monkeypatch.setattr(PipelineSearch, "instead_of", lambda self, plan, *_: plan)
    plan, one = planned(inputs), planned(inputs, most_groups=1)
    assert best.predicted.iteration_seconds <= plan.predicted.iteration_seconds
    assert plan.group_count > 1
    assert plan.max_groups is None
    assert plan.predicted.iteration_seconds < 0.9 * one.predicted.iteration_seconds
    assert any(note.startswith("one group would take") for note in plan.notes)
    assert plan.one_group is not None
    assert plan.one_group.iteration_seconds == pytest.approx(one.predicted.iteration_seconds, rel=0.02)
    assert plan.one_group.bound.iteration_seconds <= plan.one_group.iteration_seconds
    assert plan.baselines.keys() == one.baselines.keys()
    for name, rival in plan.baselines.items():
        assert (rival.iteration_seconds or inf) <= (one.baselines[name].iteration_seconds or inf)


@pytest.mark.long
def test_groups_never_make_the_plan_slower() -> None:
    inputs = fleet([("new", 1, 2), ("old", 1, 2)], bandwidth=SLOW)
    # each solves for one group to the end (3 s, quiet): two searches that are cut off need not agree
    one, several = planned(inputs, 10.0), planned(inputs, 10.0, most_groups=4)
    assert several.predicted.iteration_seconds <= one.predicted.iteration_seconds * (1 + 1e-9)
    assert several.max_groups == 4


def test_the_cost_objective_uses_the_devices_that_pay() -> None:
    cheap_old = planned(fleet(**{**PRICED, "prices": [30.0, 1.0]}), time_limit=2.0, objective="cost")
    cheap_new = planned(fleet(**{**PRICED, "prices": [1.0, 30.0]}), time_limit=2.0, objective="cost")
    kinds = fleet(**PRICED).cluster.group_of_rank
    used = [
        {kinds[rank] for group in plan.groups for ranks in group.replicas for rank in ranks}
        for plan in (cheap_new, cheap_old)
    ]
    assert used == [{0}, {1}]
    for plan in (cheap_new, cheap_old):
        assert plan.economy is not None
        tokens = plan.inputs.train.global_batch_sequences * plan.inputs.train.sequence_length
        paid = plan.economy.dollars_per_hour / 3600 * plan.predicted.iteration_seconds
        assert plan.economy.tokens_per_dollar == pytest.approx(tokens / paid)
        assert plan.gap == pytest.approx(1 - plan.economy.tokens_per_dollar / plan.economy.most_tokens_per_dollar)
        assert least_dollars(CostModel(plan.inputs), 16) <= paid * (1 + 1e-9)


def test_cost_is_no_worse_than_that_of_the_fastest_plan() -> None:
    fastest, cheapest = planned(fleet(**PRICED)), planned(fleet(**PRICED), 2.0, objective="cost")
    assert fastest.economy is not None
    assert cheapest.economy is not None
    assert cheapest.economy.tokens_per_dollar >= fastest.economy.tokens_per_dollar * (1 - 1e-9)
    assert cheapest.predicted.iteration_seconds >= fastest.predicted.iteration_seconds * (1 - 1e-9)


@pytest.mark.parametrize("most", [3.0, 8.0, 11.0])
def test_a_limit_on_cost_is_kept(most: float) -> None:
    plan = planned(fleet(**PRICED), 4.0, most_cost=most)
    assert plan.economy is not None
    assert plan.economy.dollars_per_hour <= most


def test_a_dense_part_too_large_to_replicate_is_sharded() -> None:
    options: dict[str, Any] = {"nodes": [("new", 9, 2)], "vocab_size": 8192, "memory": 19_000_000, "batch": 18}
    with pytest.raises(UserError, match="does not fit: no group of its devices holds") as caught:
        planned(fleet(**options))
    assert caught.value.code == ExitCode.DOES_NOT_FIT
    plan = planned(fleet(**options, dense_state="auto"))
    assert {group.schedule.dense_state for group in plan.groups} <= {"optimizer", "full"}


def test_a_missing_price_names_the_node_group() -> None:
    inputs = fleet(**{**PRICED, "prices": [1.0, None]})
    for wanted in ({"objective": "cost"}, {"most_cost": 5.0}):
        with pytest.raises(UserError, match=r"field nodes\.node1\.price_per_hour: missing") as caught:
            planned(inputs, **wanted)
        assert caught.value.code == ExitCode.BAD_INPUT
    assert planned(inputs).economy is None


def test_a_limit_below_the_cheapest_devices_says_what_they_cost() -> None:
    with pytest.raises(UserError, match=r"--max-cost 0\.5: the cheapest devices .* cost 1 dollars an hour") as caught:
        planned(fleet(**PRICED), most_cost=0.5)
    assert caught.value.code == ExitCode.DOES_NOT_FIT


def test_groups_too_small_for_the_model_do_not_fit() -> None:
    with pytest.raises(UserError, match="model synthetic on cluster synthetic: does not fit: ") as caught:
        planned(fleet([("new", 17, 1)], memory=1_200_000))
    assert caught.value.code == ExitCode.DOES_NOT_FIT


@pytest.mark.long
@pytest.mark.long
def test_the_plan_of_one_group_stands_where_the_search_over_groups_finds_nothing_that_fits() -> None:
    """As it looks at fewer layouts of a group than the search for one."""
    model = make_model(layers=1, experts=16, top_k=1)
    memory = 10**6 + 72 * model.expert_parameters
    profiles = {"new": make_profile("new", model=model, memory_bytes=memory)}
    inputs = make_inputs([("new", 1)] * 8, model=model, profiles=profiles, global_batch_sequences=16)
    inputs = inputs.with_train(memory_headroom=1.0)
    one, several = planned(inputs, most_groups=1), planned(inputs, most_groups=2)
    assert several.predicted.iteration_seconds <= one.predicted.iteration_seconds * (1 + 1e-9)
    assert several.max_groups == 2
    assert several.bound.iteration_seconds <= groups_bound(CostModel(inputs), 16) * (1 + 1e-9)


def test_other_assignments_have_no_objective() -> None:
    options = PlanOptions(assignment="ep", wanted=Wanted(objective="cost"))
    with pytest.raises(UserError, match="go with --assignment optimal"):
        make_plan(fleet(**PRICED), options)


@pytest.mark.parametrize("nics", [1, 2])
@pytest.mark.parametrize("bandwidth", [1e-4, 1e-2, 1.0])
def test_the_bound_of_groups_is_at_least_the_work_bound_and_below_every_plan(nics: int, bandwidth: float) -> None:
    inputs = fleet([("new", 9, 2)], nics=nics, bandwidth=bandwidth, memory=3_500_000, dense_state="auto")
    cost = CostModel(inputs)
    bound = groups_bound(cost, 16)
    assert bound >= work_bound(cost, 16)
    assert bound <= planned(inputs, 1.0).predicted.iteration_seconds


def test_where_nothing_fits_on_a_node_its_nics_bind() -> None:
    inputs = fleet([("new", 9, 2)], bandwidth=1e-4, memory=3_500_000)
    cost = CostModel(inputs)
    assert groups_bound(cost, 16) > 2 * work_bound(cost, 16)


def test_rows_between_the_device_types_of_one_machine_cross_no_nic() -> None:
    """Old devices are as fast at experts and much slower at attention: most rows change the type."""
    inputs = fleet([("new", 1, 2), ("old", 1, 2)])
    link = Link(bandwidth_gigabytes_per_second=1e-4, latency_microseconds=20.0)
    nodes = [group.model_copy(update={"machine": "one", "network": link}) for group in inputs.cluster.nodes]
    profiles = {
        name: make_profile(
            name, model=inputs.model, attention_seconds=attention, expert_seconds=1e-4, head_seconds=1e-7
        )
        for name, attention in (("new", 5e-3), ("old", 0.2))
    }
    cluster = inputs.cluster.model_copy(update={"nodes": nodes})
    inputs = inputs.model_copy(update={"cluster": cluster, "profiles": profiles})
    plan = make_plan(inputs, PlanOptions(solver=SolverOptions(time_limit=5.0)))
    assert groups_bound(CostModel(inputs), 16) <= plan.predicted.iteration_seconds


def test_experts_whose_states_are_shared_out_take_less_of_a_nodes_memory() -> None:
    """Copies of all experts on every device send no row, and fit where whole states would not."""
    inputs = fleet([("new", 4, 1)], nics=1, bandwidth=1e-4, memory=11_800_000, dense_state="optimizer", batch=4096)
    cost = CostModel(inputs)
    layout = make_layout(
        (8,) * 4, (0,) * 4, replicated=8, micro_batches=128, schedule="sequential", dense_state="optimizer"
    )
    replayed = LayoutCost(cost, layout)
    assert overflow(replayed) is None
    assert groups_bound(cost, 128) <= simulate(replayed).seconds


def test_shares_give_every_device_as_much() -> None:
    search = GroupSearch(CostModel(fleet(batch=96)), SolverOptions(), 16, Wanted())
    assert search._whole((4, 0), 41.0) == 40  # 41 sequences are one micro-batch or 41
    assert search._whole((4, 4), 41.0) == 40
    assert search._whole((4, 4), 3.0) == 3  # fewer than devices
    assert search._whole((4, 4), 500.0) == 96
    odd = GroupSearch(CostModel(fleet([("new", 1, 3)], nics=3, batch=256)), SolverOptions(time_limit=0.1), 16, Wanted())
    odd.explore()
    assert odd.limits.quantum == 2  # packed shares are multiples of it
    assert odd._whole((3,), 100.0) == 102
    assert all(share % 2 == 0 for share in odd.fair.values())


def test_groups_hold_the_dense_part_in_one_way() -> None:
    """What one group would rather share out and another gather, `train` refuses."""
    cost = CostModel(fleet(dense_state="auto"))

    def find(asked: CostModel) -> FoundGroups:
        state = asked.train.dense_state
        layouts = [
            make_layout((1,) * 4, (2,) * 4, dense_state=s)
            for s in (["optimizer", "full"] if state == "auto" else [state] * 2)
        ]
        groups = [
            Group.of(layout, [ranks]) for layout, ranks in zip(layouts, ([0, 1, 2, 3], [4, 5, 6, 7]), strict=True)
        ]
        return FoundGroups(groups, replay_groups(cost.inputs, groups), 1, 1, merit=1.0 if state == "full" else 2.0)

    found = _of_one_state(cost, find)
    assert {group.schedule.dense_state for group in found.groups} == {"full"}
