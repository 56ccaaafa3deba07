"""PP: orders, event simulation and layer split against hand calculation and brute force."""

from itertools import product
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make_inputs, make_model, make_profile
from hetermoe_cli.cost import CostModel
from hetermoe_cli.cost.ports import Network
from hetermoe_cli.planner.baselines.pipeline import MOST_DEVICES, Setup, Tuned, _Search, deal, pp, split
from hetermoe_cli.planner.baselines.pipeline_cost import PipelineCost, all_reduce_seconds
from hetermoe_cli.planner.baselines.pipeline_run import Order, Pipeline, in_flight, run, stage_order
from hetermoe_cli.spec.plan import Inputs


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
    return found.model_copy(update={"train": found.train.model_copy(update={"recompute": "none"})})


def network(devices: int) -> Network:
    """1 GB/s, no latency, a NIC each."""
    return Network(make_inputs([("new", 1)] * devices).devices())


def text(order: Order, stage: int, stages: int, micro_batches: int) -> str:
    tasks = stage_order(order, stage, stages, micro_batches)
    return " ".join(f"{'F' if task.forward else 'B'}{task.micro_batch}" for task in tasks)


def test_orders_by_hand() -> None:
    assert text("1F1B", 0, 3, 4) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert text("1F1B", 2, 3, 4) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert text("1F1B", 0, 3, 1) == "F0 B0"
    assert text("GPipe", 0, 3, 2) == "F0 F1 B0 B1"


@given(st.sampled_from(["1F1B", "GPipe"]), st.integers(1, 6), st.integers(1, 8), st.data())
def test_micro_batches_in_flight(order: Order, stages: int, micro_batches: int, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    alive = most = 0
    for task in stage_order(order, stage, stages, micro_batches):
        alive += 1 if task.forward else -1
        most = max(most, alive)
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


def value(seconds: list[float], head: float, share: list[int], micro_batches: int) -> float:
    times = [t * n for t, n in zip(seconds, share, strict=True)]
    times[-1] += head
    return sum(times) + (micro_batches - 1) * max(times)


@given(
    st.lists(st.tuples(st.sampled_from([1.0, 1.5, 3.0]), st.integers(0, 4)), min_size=1, max_size=4),
    st.integers(1, 7),
    st.sampled_from([0.0, 0.7, 5.0]),
    st.integers(1, 5),
)
def test_split_against_brute_force(
    stages: list[tuple[float, int]], layers: int, head: float, micro_batches: int
) -> None:
    seconds, most = [t for t, _ in stages], [m for _, m in stages]
    shares = [list(s) for s in product(*(range(1, m + 1) for m in most)) if sum(s) == layers]
    best = min((value(seconds, head, share, micro_batches) for share in shares), default=inf)
    found = split(layers, seconds, [0.0] * (len(stages) - 1) + [head], most, micro_batches)
    assert (found is None) == (best == inf)
    if found:
        assert found in shares
        assert value(seconds, head, found, micro_batches) == pytest.approx(best)


def test_split_keeps_to_memory() -> None:
    assert split(4, [1.0, 3.0], [0.0, 0.0], [4, 4], 8) == [3, 1]
    assert split(4, [1.0, 3.0], [0.0, 0.0], [2, 4], 8) == [2, 2]
    assert split(4, [1.0, 3.0], [0.0, 0.0], [2, 1], 8) is None


def test_micro_batches_go_where_they_end_first() -> None:
    assert deal(7, [[1.0, 1.0], [2.0, 2.0]]) == [5, 2]
    assert deal(2, [[1.0], [9.0]]) == [1, 1]


def test_memory_moves_layers_to_the_other_stage() -> None:
    cost = CostModel(inputs([("new", 1), ("old", 1)]))
    costs = PipelineCost(cost, 1, 1, "none")
    layer = costs.layer_parameters * 16
    fixed = costs.types["old"].working_head + costs.edge_parameters(False, True) * 16 + 10**6 + 4 * costs.message_bytes
    for layers in (1, 2, 3):
        room = fixed + layers * (layer + 1 * costs.types["old"].kept)
        tight = CostModel(inputs([("new", 1), ("old", 1)], old_memory=int(room / 0.9) + 10))
        assert PipelineCost(tight, 1, 1, "none").most_layers((1,), 1, False, True) == layers
    assert "layers 3-1" in pp(cost, 16).reason  # the old one takes twice as long


def test_nothing_fits() -> None:
    rival = pp(CostModel(inputs([("old", 1), ("old", 1)], old_memory=2_000_000)), 16)
    assert rival.seconds == inf
    assert "does not fit" in rival.reason


@pytest.mark.parametrize("nodes", [[("new", 1), ("old", 1)], [("new", 1), ("new", 1), ("old", 1)]])
def test_pp_is_as_fast_as_the_best_of_all_splits(nodes: list[tuple[str, int]]) -> None:
    search = _Search(CostModel(inputs(nodes)))
    fastest = inf
    for setup in search.setups():
        units = search._units(setup.width)[: setup.stages * setup.pipelines]
        if setup.pipelines > 1:
            continue
        for share in product(range(1, 5), repeat=setup.stages):
            if sum(share) == 4:
                for order in (units, units[::-1]):
                    tuned = Tuned(setup, "1F1B", [order], [list(share)], [setup.micro_batches])
                    fastest = min(fastest, search.seconds(tuned))
    assert pp(search.cost, 16).seconds == pytest.approx(fastest, rel=0.01)


def test_bounds_are_below_the_simulated_time() -> None:
    search = _Search(CostModel(inputs([("new", 1)] * 2 + [("old", 1)] * 2, batch=8)))
    for setup in search.setups():
        for tuned in search.tuned(setup, "1F1B"):
            seconds = search.seconds(tuned)
            assert search.work(setup) <= search.bound(tuned) * (1 + 1e-9)
            assert search.bound(tuned) <= seconds


def test_replicas_all_reduce_what_comes_last_after_backward() -> None:
    cost = CostModel(inputs([("new", 1)] * 4))
    costs = PipelineCost(cost, 1, 1, "none")
    stages = [[((0,), 2), ((2,), 2)], [((1,), 2), ((3,), 2)]]
    held = [2 * costs.layer_parameters + costs.edge_parameters(first, not first) for first in (True, False)]
    reduce = cost.network.all_reduce_seconds([0, 1], 2 * (costs.layer_parameters + costs.edge_parameters(True, False)))
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
    tuned = Tuned(Setup(1, 2, 1, 4, "none"), "1F1B", [units], [[2, 2]], [4])
    before, after = _Search(plain)._stage_seconds(tuned, 0), _Search(dense)._stage_seconds(tuned, 0)
    assert after == pytest.approx([before[0] + 9.0, before[1]])
    drained = _Search(dense).seconds(tuned) - two.update_seconds([[((0,), 2), ((1,), 2)]])
    assert 4 * after[0] <= drained < 4 * after[0] + after[1]  # the first stage is the slowest
    assert pp(dense, 16).seconds > pp(plain, 16).seconds
    assert "layers 1-3" in pp(dense, 16).reason


def test_too_many_devices_are_not_searched() -> None:
    rival = pp(CostModel(inputs([("new", MOST_DEVICES + 1)])), 16)
    assert rival.layout is None
    assert "not computed" in rival.reason


def test_setups_text() -> None:
    setup = Setup(width=2, stages=2, pipelines=3, micro_batches=12, recompute="all")
    tuned = Tuned(setup, "1F1B", [[(0, 1), (2, 3)]] * 3, [[6, 2]] * 3, [4, 4, 4])
    assert str(tuned) == "1F1B, R = 4, 3 x 2 stages of 2 devices, recomputation, layers 6-2"
