"""PP: orders, event simulation and layer split against hand calculation and brute force."""

from dataclasses import replace
from itertools import product
from math import inf
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make_inputs, make_model, make_profile, sequential
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.ports import Network
from hetermoe_cli.planner.baselines.pp import MOST_DEVICES, pp
from hetermoe_cli.planner.pipeline_search.cost import PipelineCost, all_reduce_seconds
from hetermoe_cli.planner.pipeline_search.layer_split import Held, Way, deal, split, useful
from hetermoe_cli.planner.pipeline_search.run import Order, Pipeline, in_flight, run, stage_order
from hetermoe_cli.planner.pipeline_search.search import PipelineSearch
from hetermoe_cli.planner.pipeline_search.setups import Setup, Tuned
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import LayerPlacement, Layout, PipelineStage


def inputs(nodes: list[tuple[str, int]], *, batch: int = 4, layers: int = 4, old_memory: int = 10**10) -> Inputs:
    """New devices take 1 s a sequence in attention and old ones 2 s; experts likewise."""
    model = make_model(layers=layers, experts=4)
    profiles = {
        "new": make_profile("new", model=model),
        "old": make_profile("old", model=model, attention_seconds=2.0, expert_seconds=0.02, memory_bytes=old_memory),
    }
    found = make_inputs(
        nodes, model=model, profiles={name: profiles[name] for name, _ in nodes}, global_batch_sequences=batch
    )
    return found.with_train(recompute="none")


def network(devices: int) -> Network:
    """1 GB/s, no latency, a NIC each."""
    return Network(make_inputs([("new", 1)] * devices).devices())


def text(order: Order, stage: int, stages: int, micro_batches: int) -> str:
    found = stage_order(order, stage, stages, micro_batches)
    return " ".join("+".join(f"{'F' if task.forward else 'B'}{task.micro_batch}" for task in step) for step in found)


def test_orders_by_hand() -> None:
    assert text("1F1B", 0, 3, 4) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert text("1F1B", 2, 3, 4) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert text("1F1B", 0, 3, 1) == "F0 B0"
    assert text("GPipe", 0, 3, 2) == "F0 F1 B0 B1"
    assert text("woven", 0, 2, 5) == "F0 F1 F2 F3+B0 F4+B1 B2 B3 B4"
    assert text("woven", 1, 2, 5) == "F0 F1+B0 F2+B1 F3+B2 F4+B3 B4"


@given(st.sampled_from(get_args(Order)), st.integers(1, 6), st.integers(1, 8), st.data())
def test_micro_batches_in_flight(order: Order, stages: int, micro_batches: int, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    alive = most = 0
    for step in stage_order(order, stage, stages, micro_batches):
        alive += any(task.forward for task in step)
        most = max(most, alive)
        alive -= any(not task.forward for task in step)
    assert most == in_flight(order, stage, stages, micro_batches)


@pytest.mark.parametrize("order", ["1F1B", "GPipe"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 2), (4, 7), (3, 1)])
def test_equal_stages_without_messages(order: Order, stages: int, micro_batches: int) -> None:
    ranks = tuple((rank,) for rank in range(stages))
    pipeline = Pipeline(ranks, (1.0,) * stages, (2.0,) * stages, micro_batches)
    assert run(network(stages), [pipeline], order, 0.0) == pytest.approx((micro_batches + stages - 1) * 3)


def test_messages_by_hand() -> None:
    # F 1, message 1, F 1, B 2, message 1, B 2
    pipeline = Pipeline(((0,), (1,)), (1.0, 1.0), (2.0, 2.0), 1)
    assert run(network(2), [pipeline], "1F1B", 1e9) == pytest.approx(8)


def test_messages_of_pipelines_behind_one_nic_wait_for_each_other() -> None:
    # both first stages end at 1 and send 1 GB through one NIC: the second message arrives at 3, its backward at 1 + 7
    shared = Network(make_inputs([("new", 2), ("old", 2)]).devices())
    pipelines = [Pipeline(((0,), (2,)), (1.0, 1.0), (2.0, 2.0), 1), Pipeline(((1,), (3,)), (1.0, 1.0), (2.0, 2.0), 1)]
    assert run(shared, pipelines, "1F1B", 1e9) == pytest.approx(9)


def test_units_send_side_by_side() -> None:
    pipeline = Pipeline(((0, 1), (2, 3)), (1.0, 1.0), (2.0, 2.0), 1)
    assert run(network(4), [pipeline], "1F1B", 1e9) == pytest.approx(8)


def test_woven_steps_by_hand() -> None:
    """Stage 1: F0 from 1, F1 and B0 from 2 to 4.5, then F2 and B1 to 7 and B2 to 9; stage 0 has gone forward thrice at
    3, and ends with B0 at 6.5, B1 at 9, B2 at 11."""
    pipeline = Pipeline(((0,), (1,)), (1.0, 1.0), (2.0, 2.0), 3, (2.5, 2.5))
    assert run(network(2), [pipeline], "woven", 0.0) == pytest.approx(11)


def value(held: list[Held], micro_batches: int) -> float:
    times = [one.seconds for one in held]
    return sum(times) + (micro_batches - 1) * max(times)


def plain_ways(seconds: list[float], head: float, most: list[int]) -> list[list[Way]]:
    """One for each stage; the last one has a head."""
    last = len(seconds) - 1
    return [[Way("none", t, head * (i == last), m)] for i, (t, m) in enumerate(zip(seconds, most, strict=True))]


@given(
    st.lists(st.tuples(st.sampled_from([1.0, 1.5, 3.0]), st.integers(0, 4)), min_size=1, max_size=4),
    st.integers(1, 7),
    st.sampled_from([0.0, 0.7, 5.0]),
    st.integers(1, 5),
)
def test_split_against_brute_force(
    stages: list[tuple[float, int]], layers: int, head: float, micro_batches: int
) -> None:
    ways = plain_ways([t for t, _ in stages], head, [m for _, m in stages])
    shares = [s for s in product(*(range(1, m + 1) for _, m in stages)) if sum(s) == layers]
    every = [[Held(count, way) for count, (way,) in zip(share, ways, strict=True)] for share in shares]
    best = min((value(held, micro_batches) for held in every), default=inf)
    found = split(layers, ways, micro_batches)
    assert (found is None) == (best == inf)
    if found:
        assert found in every
        assert value(found, micro_batches) == pytest.approx(best)


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(1, 6),
)
def test_the_slowest_stage_is_as_fast_as_any_recomputation_lets_it_be(
    stages: list[list[tuple[int, int]]], layers: int
) -> None:
    every = [[Way("none", float(t), 0.0, m) for t, m in ways] for ways in stages]
    options = [[Held(n, way) for way in ways for n in range(1, way.most + 1)] for ways in every]
    best = min(
        (max(h.seconds for h in c) for c in product(*options) if sum(h.layers for h in c) == layers), default=inf
    )
    found = split(layers, [useful(ways) for ways in every], 10**6)
    assert (max(held.seconds for held in found) if found else inf) == best


def test_split_keeps_to_memory() -> None:
    def layers(most: list[int]) -> list[int]:
        return [held.layers for held in split(4, plain_ways([1.0, 3.0], 0.0, most), 8) or []]

    assert layers([4, 4]) == [3, 1]
    assert layers([2, 4]) == [2, 2]
    assert layers([2, 1]) == []
    ways = [[Way("none", 1.0, 0.0, 2), Way("all", 1.5, 0.0, 4)], [Way("none", 5.0, 0.0, 4)]]
    assert [(held.layers, held.way.recompute) for held in split(4, ways, 8) or []] == [(3, "all"), (1, "none")]


def test_micro_batches_go_where_they_end_first() -> None:
    assert deal(7, [[1.0, 1.0], [2.0, 2.0]]) == [5, 2]
    assert deal(2, [[1.0], [9.0]]) == [1, 1]


def test_memory_moves_layers_to_the_other_stage() -> None:
    cost = CostModel(inputs([("new", 1), ("old", 1)]))
    for layers in (1, 2, 3):
        stages = [PipelineStage(layers=4 - layers, ranks=[0]), PipelineStage(layers=layers, ranks=[1])]
        placement = [LayerPlacement(experts=[[0, 1, 2, 3], []])] * (4 - layers)
        placement += [LayerPlacement(experts=[[], [0, 1, 2, 3]])] * layers
        schedule = sequential(4)
        layout = Layout(schedule=schedule, sequences_per_rank=[1, 1], placement=placement, pipeline=stages)
        room = LayoutCost(cost, layout).memory(1).total_bytes
        for more, most in ((0.01, layers), (-0.01, layers - 1)):
            tight = CostModel(inputs([("new", 1), ("old", 1)], old_memory=int((1 + more) * room / 0.9)))
            assert PipelineCost(tight, 1, 1, "none").most_layers((1,), 1, False, True) == most
    assert "layers 3-1" in pp(cost, 16).reason  # the old one takes twice as long


def test_nothing_fits() -> None:
    rival = pp(CostModel(inputs([("old", 1), ("old", 1)], old_memory=2_000_000)), 16)
    assert rival.seconds == inf
    assert "does not fit" in rival.reason


@pytest.mark.parametrize("nodes", [[("new", 1), ("old", 1)], [("new", 1), ("new", 1), ("old", 1)]])
def test_pp_is_as_fast_as_the_best_of_all_splits(nodes: list[tuple[str, int]]) -> None:
    search = PipelineSearch(CostModel(inputs(nodes)))
    fastest = inf
    for setup in search.setups():
        units = search._units(setup.width)[: setup.stages * setup.pipelines]
        if setup.pipelines > 1:
            continue
        for share in product(range(1, 5), repeat=setup.stages):
            if sum(share) == 4:
                for order in (units, units[::-1]):
                    again = [["none"] * setup.stages]
                    tuned = Tuned(setup, "1F1B", [order], [list(share)], again, [setup.micro_batches])
                    fastest = min(fastest, search.seconds(tuned))
    assert pp(search.cost, 16).seconds == pytest.approx(fastest, rel=0.01)


def test_bounds_are_below_the_simulated_time() -> None:
    search = PipelineSearch(
        CostModel(inputs([("new", 1)] * 2 + [("old", 1)] * 2, batch=8)), passes=("in_turn", "woven")
    )
    assert {setup.passes for setup in search.setups()} == {"in_turn", "woven"}
    for setup in search.setups():
        for tuned in search.tuned(setup, setup.order):
            seconds = search.seconds(tuned)
            assert search.work(setup) <= search.bound(tuned) * (1 + 1e-9)
            assert search.bound(tuned) <= seconds


def test_replicas_all_reduce_what_comes_last_after_backward() -> None:
    cost = CostModel(inputs([("new", 1)] * 4))
    costs = PipelineCost(cost, 1, 1, "none")
    stages = [[((0,), 2), ((2,), 2)], [((1,), 2), ((3,), 2)]]
    layers = 2 * (cost.model.attention_layer_parameters + costs.hosted * cost.model.expert_parameters)
    held = [layers + costs.edge_parameters(first, not first) for first in (True, False)]
    reduce = cost.network.all_reduce_seconds([0, 1], layers + 2 * costs.edge_parameters(True, False))
    step = cost.optimizer_seconds(cost.of(0), max(held))
    assert costs.update_seconds(stages) == pytest.approx(reduce + step)
    assert costs.update_seconds(stages[:1]) == pytest.approx(step)


def test_rings_on_one_port_add_up() -> None:
    cost = CostModel(inputs([("new", 1)] * 3))
    one = all_reduce_seconds(cost, iter([((0, 1), 10**9)]))
    assert one == pytest.approx(cost.network.all_reduce_seconds([0, 1], 1e9))
    assert all_reduce_seconds(cost, iter([((0, 1), 10**9), ((0, 2), 10**9)])) == pytest.approx(2 * one)


def test_a_unit_shares_attention_and_experts() -> None:
    cost = CostModel(inputs([("new", 1)] * 2))
    one, two = PipelineCost(cost, 2, 1, "none"), PipelineCost(cost, 2, 2, "none")
    assert two.types["new"].forward == pytest.approx(one.types["new"].forward / 2)
    rows = 64  # a device keeps half of its 128 rows, the others travel there and back
    assert two.unit((0, 1)).forward - two.types["new"].forward == pytest.approx(2 * rows * cost.row_bytes / 1e9)


def test_dense_layers_are_work_and_memory_of_the_first_stage() -> None:
    plain = CostModel(inputs([("new", 1)] * 2))
    model = make_model(layers=4, experts=4, dense_layers=2, dense_ffn_size=96)
    found = make_inputs([("new", 1)] * 2, model=model, global_batch_sequences=4)
    dense = CostModel(found.model_copy(update={"train": plain.train}))
    one, two = PipelineCost(plain, 1, 1, "none"), PipelineCost(dense, 1, 1, "none")
    units = [(0,), (1,)]
    assert two.extra(units)[0] - one.extra(units)[0] == pytest.approx(3 * 2 * 1.5)
    assert two.extra(units)[1] == one.extra(units)[1]
    assert PipelineCost(dense, 1, 1, "attention").unit((0,)).dense == pytest.approx((3.0, 6.0 + 3.0))
    more = two.edge_parameters(True, False) - one.edge_parameters(True, False)
    assert more == 2 * model.dense_layer_parameters
    assert two.edge_parameters(False, True) == one.edge_parameters(False, True)
    tuned = Tuned(Setup(1, 2, 1, 4), "1F1B", [units], [[2, 2]], [["none", "none"]], [4])
    before, after = PipelineSearch(plain)._stage_seconds(tuned, 0), PipelineSearch(dense)._stage_seconds(tuned, 0)
    assert after == pytest.approx([before[0] + 9.0, before[1]])
    drained = PipelineSearch(dense).seconds(tuned) - two.update_seconds([[((0,), 2), ((1,), 2)]])
    assert 4 * after[0] <= drained < 4 * after[0] + after[1]  # the first stage is the slowest
    assert pp(dense, 16).seconds > pp(plain, 16).seconds
    assert "layers 1-3" in pp(dense, 16).reason


def test_too_many_devices_are_not_searched() -> None:
    rival = pp(CostModel(inputs([("new", MOST_DEVICES + 1)])), 16)
    assert rival.layout is None
    assert "not computed" in rival.reason


def test_setups_text() -> None:
    setup = Setup(width=2, stages=2, pipelines=3, micro_batches=12)
    tuned = Tuned(setup, "1F1B", [[(0, 1), (2, 3)]] * 3, [[6, 2]] * 3, [["none", "none"]] * 3, [4, 4, 4])
    assert str(tuned) == "1F1B, R = 4, 3 x 2 stages of 2 devices, layers 6-2"
    again = replace(tuned, recompute=[["all", "none"]] * 3)
    assert str(again) == "1F1B, R = 4, 3 x 2 stages of 2 devices, layers 6-2, recomputation all-none"
