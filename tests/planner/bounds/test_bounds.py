"""Every bound against replays of random device-level placements: closed forms, chains, patterns, limits."""

import random

import numpy as np
import pytest
from instances import random_choice, random_counts, random_inputs
from test_properties import build

from builders import make_inputs, make_layout, make_model, make_profile, make_schedule
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.bounds.chains import canonical
from hetermoe_cli.planner.bounds.closed_form import Bounder
from hetermoe_cli.planner.bounds.master import mixture
from hetermoe_cli.planner.bounds.patterns import Patterns, caps_within
from hetermoe_cli.planner.bounds.rows import Of, Rows
from hetermoe_cli.planner.bounds.work import work_bound
from hetermoe_cli.planner.instance.choice import ALL, Choice
from hetermoe_cli.planner.instance.deal import number
from hetermoe_cli.planner.instance.prepared import Prepared
from hetermoe_cli.planner.milp import problem as milp
from hetermoe_cli.planner.replay import overflow, replay_seconds
from hetermoe_cli.planner.search.candidates import _slots
from hetermoe_cli.planner.search.space import kinds
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.load import ExpertLoad


def test_equal_shares_of_an_optimizer_step_are_not_bound_to_the_work() -> None:
    """Devices that share out states step as much, though one of them attends to nearly all sequences."""
    model = make_model(vocab_size=16384, ffn_size=8)
    profiles = {
        name: make_profile(
            name, model=model, attention_seconds=attention, expert_seconds=1e-7, head_seconds=1e-8,
            optimizer_seconds_per_parameter=1e-6, memory_bytes=10**10,
        )
        for name, attention in (("new", 1e-3), ("old", 0.1))
    }  # fmt: skip
    link = Link(bandwidth_gigabytes_per_second=100.0, latency_microseconds=0.0)
    nodes = [("new", 1), ("old", 1)]
    inputs = make_inputs(
        nodes, model=model, profiles=profiles, global_batch_sequences=10, network=link, interconnect=link
    )
    cost = CostModel(inputs.with_train(dense_state="optimizer"))
    layout = make_layout((9, 1), (0, 0), replicated=4, micro_batches=1, dense_state="optimizer")
    replayed = LayoutCost(cost, layout)
    assert overflow(replayed) is None
    assert work_bound(cost, 16) <= simulate(replayed).seconds


def random_case(
    rng: random.Random, devices: int, layers: int, experts: int, *, flat: bool, dense_layers: int = 0
) -> tuple[CostModel, Choice]:
    """Costs of a random cluster and model, and a choice for it."""
    choice = random_choice(rng, devices)
    batch = sum(choice.sequences) * choice.schedule.micro_batches
    inputs = random_inputs(
        rng, devices=devices, layers=layers, experts=experts, batch=batch, flat=flat, dense_layers=dense_layers
    )
    return CostModel(inputs), choice


def closed_bound(cost: CostModel, choice: Choice, most: float) -> float:
    """Of one choice; infinite above `most`, of which it is as exact as a 2^24th part."""
    members = kinds(cost.devices)
    parts = [[tuple(sorted((choice.sequences[rank] for rank in ranks), reverse=True))] for ranks in members]
    bounder = Bounder(cost, members, choice.schedule, choice.micro_batch_sequences)
    return float(bounder.bounds(_slots(np.zeros((1, len(members)), dtype=np.int64), parts), most)[0])


def test_closed_bounds_know_that_all_reduces_overlap_with_backward() -> None:
    """All of them after compute would be 4 % above this replay."""
    inputs = build(
        news=3, olds=1, layers=3, experts=6, batch=2, old=2.0, old_experts=2.5, expert=1e-05, bandwidth=0.02
    )  # fmt: skip
    cost, choice = CostModel(inputs), Choice(make_schedule("zebra", 1), (1, 1, 0, 0))
    replay = simulate(LayoutCost(cost, choice.layout([number([2, 2, 2, 0], 0)] * 3))).seconds
    assert 0.8 * replay < closed_bound(cost, choice, replay) < replay


def test_closed_bounds_know_that_all_reduces_may_be_faster_than_messages() -> None:
    """Profiles measure both; the bound charges what the replay does."""
    cost, choice = CostModel(slow_messages()), Choice(make_schedule("zebra", 1), (1, 1))
    replay = simulate(LayoutCost(cost, choice.layout([number([1, 1], 0)]))).seconds
    assert 0.9 * replay < closed_bound(cost, choice, replay * (1 + 1e-6)) < replay * (1 + 1e-6)


def slow_messages() -> Inputs:
    """Two devices that mostly wait for their all-reduce, at a hundred times the messages' bandwidth."""
    return on_slow_links(["new"] * 2, 1e-3, 0.1, batch=2, new=(1e-9, 1e-12))


def on_slow_links(
    types: list[str], messages: float, all_reduces: float, *, batch: int, **seconds: tuple[float, float]
) -> Inputs:
    """A layer of two experts on devices of these types, whose links have so many GB/s for either and no latency.

    `seconds`: of attention and of experts, by type.
    """
    link = Link(
        bandwidth_gigabytes_per_second=messages, all_reduce_gigabytes_per_second=all_reduces, latency_microseconds=0.0
    )  # fmt: skip
    model = make_model(layers=1, experts=2, top_k=1)
    profiles = {
        name: make_profile(name, model=model, attention_seconds=attention, expert_seconds=expert)
        for name, (attention, expert) in seconds.items()
    }
    return make_inputs(
        [(name, 1) for name in types],
        model=model,
        profiles=profiles,
        global_batch_sequences=batch,
        network=link,
        interconnect=link,
    )


def test_closed_bounds_know_that_both_links_of_a_device_carry_a_part_of_one_transfer() -> None:
    """Half of the host's rows come from its neighbour; all of them through its NIC would take twice as long."""
    cost, choice = CostModel(host_between_two()), Choice(make_schedule("zebra", 4), (1, 0, 1))
    replay = simulate(LayoutCost(cost, choice.layout([number([0, 2, 0], 0)]))).seconds
    assert 0.6 * replay < closed_bound(cost, choice, replay * (1 + 1e-6)) < replay * (1 + 1e-6)


def host_between_two() -> Inputs:
    """Two devices that attend, one of them in the node of the only one that is fast at experts, on equal slow links."""
    inputs = on_slow_links(["new", "old", "new"], 1e-4, 1.0, batch=8, new=(1e-6, 1.0), old=(10.0, 1e-9))
    nodes = [node.model_copy(update={"machine": "box"} if i < 2 else {}) for i, node in enumerate(inputs.cluster.nodes)]
    return inputs.model_copy(update={"cluster": inputs.cluster.model_copy(update={"nodes": nodes})})


def test_the_work_bound_under_a_load_with_samples_knows_what_hotter_experts_save() -> None:
    """All rows on one expert or the other: one kernel of twice the rows, whose fixed part is paid once."""
    model = make_model(layers=1, experts=2, top_k=1)
    profile = make_profile("new", model=model, attention_seconds=1e-6)
    [table] = profile.tables
    points = [point.model_copy(update={"forward_seconds": 1.0 + 1e-3 * point.tokens}) for point in table.expert]
    profile = profile.model_copy(update={"tables": [table.model_copy(update={"expert": points})]})
    inputs = make_inputs([("new", 1)], model=model, profiles={"new": profile}, global_batch_sequences=1)
    load = ExpertLoad(layers=[[1.0, 1.0]], samples=[[[1.0, 0.0]], [[0.0, 1.0]]])
    cost = CostModel(inputs.model_copy(update={"expert_load": load}))
    layout = Choice(make_schedule("zebra", 1), (1,)).layout([number([2], 0)])
    replay = replay_seconds(LayoutCost(cost, layout))
    assert 0.5 * replay < work_bound(cost, 16) <= replay


def test_closed_bounds_know_that_who_hosts_nothing_needs_no_room_to_work_on_experts() -> None:
    """The attending device's memory ends within what any first expert's working set would take."""
    model = make_model(layers=1, experts=2, top_k=1)
    choice = Choice(make_schedule("zebra", 1), (1, 0))

    def cost(memory: int) -> CostModel:
        new = make_profile("new", model=model, memory_bytes=memory)
        profiles = {"new": new, "old": make_profile("old", model=model)}
        inputs = make_inputs([("new", 1), ("old", 1)], model=model, profiles=profiles, global_batch_sequences=1)
        return CostModel(inputs.with_train(memory_headroom=1.0))

    layout = choice.layout([number([0, 2], 0)])
    needed = LayoutCost(cost(10**10), layout).memory(0).total_bytes
    tight = LayoutCost(cost(needed + 8), layout)
    replay = simulate(tight).seconds
    assert overflow(tight) is None
    assert closed_bound(tight.cost, choice, replay * (1 + 1e-6)) < replay * (1 + 1e-6)


@pytest.mark.parametrize("dense_layers", [0, 2])
@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(s, marks=pytest.mark.long) for s in range(10, 30))])
def test_bounds_hold_for_every_device_level_placement(seed: int, dense_layers: int) -> None:
    rng = random.Random(seed)
    devices, layers, experts = rng.randint(1, 6), rng.randint(1, 4), rng.randint(1, 7)
    cost, choice = random_case(rng, devices, layers, experts, flat=seed % 3 > 0, dense_layers=dense_layers)
    ready = Prepared.of(cost, choice)
    for _ in range(4):
        counts = random_counts(rng, devices, layers, experts)
        layout = choice.layout([number(row[:-1], row[-1]) for row in counts])
        replay = simulate(LayoutCost(cost, layout)).seconds
        assert closed_bound(cost, choice, replay * (1 + 1e-6)) <= replay * (1 + 1e-6)
        if choice.schedule.recompute == "none":
            assert work_bound(cost, 16) <= replay * (1 + 1e-9)
        totals = np.array([[sum(row[rank] for rank in c.ranks) for row in counts] for c in ready.classes])
        copies = np.array([row[-1] for row in counts])
        _check_chains(ready, totals, copies, layout_cost=LayoutCost(cost, layout), replay=replay)
        _check_mixture(ready, counts, totals, copies, replay)


def _check_chains(
    ready: Prepared, totals: np.ndarray, copies: np.ndarray, layout_cost: LayoutCost, replay: float
) -> None:
    """Every row's sum over the layers is at most the replay."""
    caps, _ = caps_within(ready.rates, replay)
    patterns = Patterns(ready.rates, totals, copies, tuple(caps))
    rows = Rows(patterns)
    rows.extend(canonical(rows.layers))
    every, last = rows.values
    sums = every[:, :-1].sum(1) + last[:, -1] + rows.constants
    model = layout_cost.cost
    step = max(
        model.optimizer_seconds(model.of(rank), layout_cost.parameters(rank)) for rank in range(len(model.devices))
    )
    assert sums[rows.index(Of.STEP)].max() <= step * (1 + 1e-9)
    assert rows.makespan(sums) + ready.rates.gathers[0][0] + step <= replay * (1 + 1e-9)


def _check_mixture(
    ready: Prepared, counts: list[list[int]], totals: np.ndarray, copies: np.ndarray, replay: float
) -> None:
    """The mixture's bound holds, and its limits leave room for the placement itself."""
    found = mixture(ready.rates, replay * (1 + 1e-9), mixed=True)
    if ready.rates.layers == 1:
        assert found is None
        return
    assert found is not None
    assert found.bound <= replay * (1 + 1e-6)
    table = np.vstack([totals, copies])
    assert (table.min(1) >= found.limits.least).all()
    assert (table.max(1) <= found.limits.most).all()
    for index, device_class in enumerate(ready.classes):
        for row, total in zip(counts, totals[index], strict=True):
            if device_class.count > 1 and total and min(row[rank] for rank in device_class.ranks) == 0:
                assert total <= found.limits.partial[index]


@pytest.mark.parametrize("apart", [1, 2, ALL])
@pytest.mark.parametrize("seed", range(12))
def test_the_mean_milp_has_room_for_every_device_level_placement(seed: int, apart: int) -> None:
    """With one of their renumberings within their own replay, whichever devices have variables of their own."""
    rng = random.Random(seed)
    devices, layers, experts = rng.randint(2, 5), rng.randint(1, 3), rng.randint(1, 6)
    cost, choice = random_case(rng, devices, layers, experts, flat=seed % 3 > 0)
    ready = Prepared.of(cost, choice, apart)
    options = SolverOptions(time_limit=20.0, relative_gap=0.5)
    for _ in range(2):
        counts = random_counts(rng, devices, layers, experts)
        layout = choice.layout([number(row[:-1], row[-1]) for row in counts])
        replay = simulate(LayoutCost(cost, layout)).seconds
        run = milp.solve(milp.build(ready.rates, ready.graph, replay * (1 + 1e-6), "mean"), options)
        assert run.status in ("optimal", "feasible")
        assert run.bound <= replay * (1 + 1e-6)


@pytest.mark.parametrize("apart", [0, 1, 2, ALL])
def test_the_mean_milp_does_not_charge_a_nic_with_a_device_apart_and_the_mean_of_those_elsewhere(apart: int) -> None:
    """One expert in each of two nodes is best: of three devices that are left one hosts, but in the other node."""
    model = make_model(layers=1, experts=2, top_k=1)
    profiles = {
        "new": make_profile("new", model=model, attention_seconds=1e-6, expert_seconds=1.0),
        "old": make_profile("old", model=model, expert_seconds=1e-9),
    }
    fast, slow = (Link(bandwidth_gigabytes_per_second=speed, latency_microseconds=0.0) for speed in (1.0, 1e-4))
    inputs = make_inputs(
        [("new", 1), ("old", 2), ("old", 2)], model=model, profiles=profiles, global_batch_sequences=8, network=slow
    )
    nodes = [node.model_copy(update={"network": fast} if node.device == "new" else {}) for node in inputs.cluster.nodes]
    inputs = inputs.model_copy(update={"cluster": inputs.cluster.model_copy(update={"nodes": nodes})})
    cost, choice = CostModel(inputs), Choice(make_schedule("zebra", 8), (1, 0, 0, 0, 0))
    replay = simulate(LayoutCost(cost, choice.layout([number([0, 1, 0, 1, 0], 0)]))).seconds
    ready = Prepared.of(cost, choice, apart)
    model_of = milp.build(ready.rates, ready.graph, replay * (1 + 1e-6), "mean")
    assert milp.solve(model_of, SolverOptions(time_limit=20.0)).status == "optimal"
