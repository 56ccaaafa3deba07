"""simulator.py: timelines computed by hand, conservation of work, and what scales."""

import itertools
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import any_layouts, make_cost, make_inputs, make_layout, make_model, make_profile, parse_schedule
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.load import RecordedLoad
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Action, Kind, parse_action
from hetermoe_cli.schedule.lower import training_schedule, validation_schedule
from hetermoe_cli.schedule.schedule import Schedule, inputs
from hetermoe_cli.simulator import check_deadlock, simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.trace import Span, Trace, display_name
from reference_simulator import reference_spans

ROWS = 4 * 32  # of one micro-batch: 64 tokens, top-2
ROW_BYTES = 128

# Forward seconds: attention 1, experts 2, head 0.5; backward twice as long; a transfer takes a quarter.
TIMELINE = """
0AF0 0 1      0AF1 1 2          0DF0 1 1.25       0DF1 2 2.25
0EF0 1.25 3.25                  0EF1 3.25 5.25    0CF0 3.25 3.5     0CF1 5.25 5.5
1AF0 3.5 4.5  1AF1 5.5 6.5      1DF0 4.5 4.75     1DF1 6.5 6.75
1EF0 5.25 7.25                  1EF1 7.25 9.25    1CF0 7.25 7.5     1CF1 9.25 9.5
0HB0 7.5 9    0HB1 9.5 11       1CB0 9 9.25       1CB1 11 11.25
1EB0 9.25 13.25                 1EB1 13.25 17.25  1DB0 13.25 13.5   1DB1 17.25 17.5
1AB0 13.5 15.5                  1AB1 17.5 19.5    0CB0 15.5 15.75   0CB1 19.5 19.75
0EB0 17.25 21.25                0EB1 21.25 25.25  0DB0 21.25 21.5   0DB1 25.25 25.5
0AB0 21.5 23.5                  0AB1 25.5 27.5    0SB0 27.5 27.5
"""


def hand_inputs(slowdown: float = 1.0) -> Inputs:
    """The costs above, all of them times `slowdown`; the optimizer takes next to nothing."""
    profile = make_profile(
        attention_seconds=slowdown,
        expert_seconds=slowdown * 2.0 / ROWS,
        head_seconds=slowdown * 0.5 / 64,
        optimizer_seconds_per_parameter=1e-15 * slowdown,
    )
    bandwidth = ROWS * ROW_BYTES / 0.25 / slowdown
    link = Link(bandwidth_gigabytes_per_second=bandwidth / 1e9, latency_microseconds=0.0)
    return make_inputs((("new", 1), ("new2", 1)), profiles={"new": profile, "new2": profile}, network=link)


def cost_of(layout: Layout, inputs: Inputs) -> LayoutCost:
    return LayoutCost(CostModel(inputs), layout)


def by_name(trace: Trace) -> dict[str, tuple[float, float]]:
    """Interval of every task of a trace in which no two ranks compute the same task."""
    return {span.name: (span.start, span.end) for span in trace.spans}


def expected(text: str) -> dict[str, tuple[float, float]]:
    words = text.split()
    return {
        display_name(parse_action(name)): (float(start), float(end))
        for name, start, end in zip(words[::3], words[1::3], words[2::3], strict=True)
    }


def test_zebra_timeline_by_hand() -> None:
    times = by_name(simulate(cost_of(make_layout(), hand_inputs())))
    optimizer = times.pop("optimizer 0")
    wanted = expected(TIMELINE)
    assert times.keys() == wanted.keys()
    assert {name: times[name] for name in wanted} == {name: pytest.approx(wanted[name]) for name in wanted}
    assert optimizer[0] == pytest.approx(27.5)


def test_sequential_adds_every_task_up() -> None:
    trace = simulate(cost_of(make_layout(schedule="sequential"), hand_inputs()))
    forward, head, backward = 2 * (1 + 0.25 + 2 + 0.25), 1.5, 2 * (0.25 + 4 + 0.25 + 2)
    assert trace.seconds == pytest.approx(2 * (forward + head + backward))


def test_one_micro_batch_overlaps_nothing() -> None:
    layout = make_layout(micro_batches=1)
    trace = simulate(cost_of(layout, hand_inputs()))
    assert trace.seconds == pytest.approx(7 + 1.5 + 13)


def test_validation_is_the_forward_half() -> None:
    layout = make_layout()
    times = by_name(simulate(cost_of(layout, hand_inputs()), validation_schedule(layout)))
    wanted = {name: time for name, time in expected(TIMELINE).items() if "F" in name}
    assert {name: times[name] for name in wanted} == {name: pytest.approx(wanted[name]) for name in wanted}
    assert times.keys() - wanted.keys() == {"head 0", "head 1"}
    assert times["head 0"] == pytest.approx((7.5, 8.0))
    assert times["head 1"] == pytest.approx((9.5, 10.0))


def test_one_device_does_everything_in_turn() -> None:
    layout = make_layout((1,), (4,))
    cost = make_cost(layout, model=make_model())
    trace = simulate(cost)
    assert {span.lane for span in trace.spans} == {"compute"}
    work = sum(cost.seconds(0, action) for action in training_schedule(layout).compute[0] if action.kind != "S")
    assert trace.seconds == pytest.approx(work)
    assert trace.busy_share(1) == [pytest.approx(1.0)]


def test_synchronisation_waits_for_all_and_comes_before_every_optimizer() -> None:
    cost = make_cost(make_layout((1, 1, 0), (1, 1, 2)), model=make_model())
    spans = simulate(cost).spans
    ends = [s.end for s in spans if not s.name.startswith(("synchronise", "optimizer"))]
    synchronise = [s for s in spans if s.name.startswith("synchronise")]
    assert [s.rank for s in synchronise] == [0, 1, 2]
    assert {s.start for s in synchronise} == {max(ends)}
    assert synchronise[0].end - synchronise[0].start == pytest.approx(cost.synchronise_seconds)
    assert {s.start for s in spans if s.name == "optimizer 0"} == {synchronise[0].end}


def test_transfers_that_share_a_nic_direction_follow_each_other() -> None:
    # Each node holds an attending rank and a host, so that dispatch and combine leave through the same NIC.
    layout = make_layout((1, 0, 1, 0), (0, 2, 0, 2), micro_batches=4)
    slow = Link(bandwidth_gigabytes_per_second=1e-5, latency_microseconds=0.0)
    shared = make_cost(layout, [("new", 2), ("new", 2)], model=make_model(), network=slow)
    apart = make_cost(layout, [("new", 2), ("new", 2)], model=make_model(), network=slow, nics=2)
    assert overlaps(simulate(shared)) == 0
    assert overlaps(simulate(apart)) > 0
    assert simulate(shared).seconds > simulate(apart).seconds


def test_a_rank_sends_one_transfer_at_a_time_even_through_different_ports() -> None:
    # Layer 0 lives on a neighbour behind a slow interconnect, layer 1 in another node: no port in common.
    placement = [LayerPlacement(experts=hosts) for hosts in ([[], [0, 1], []], [[], [], [0, 1]])]
    layout = make_layout(micro_batches=4).model_copy(update={"sequences_per_rank": [1, 0, 0], "placement": placement})
    slow = Link(bandwidth_gigabytes_per_second=1e-6, latency_microseconds=0.0)
    cost = make_cost(layout, [("new", 2), ("new", 1)], interconnect=slow)
    assert not set(cost.transfer(parse_action("0DF3")).ports) & set(cost.transfer(parse_action("1DF0")).ports)
    times = by_name(simulate(cost))
    assert times["1AF0"][1] < times["0DF3"][1]
    assert times["1DF0"][0] == times["0DF3"][1]


def overlaps(trace: Trace) -> int:
    """Pairs of a transfer towards the experts and one back that run at the same time."""
    there, back = ({(s.start, s.end) for s in trace.spans if s.lane == lane} for lane in ("to experts", "from experts"))
    return sum(max(a[0], b[0]) < min(a[1], b[1]) - 1e-9 for a in there for b in back)


@given(any_layouts())
def test_conservation(layout: Layout) -> None:
    cost, schedule = make_cost(layout), training_schedule(layout)
    trace = simulate(cost, schedule)
    lanes: dict[tuple[int, str], list[Span]] = defaultdict(list)
    for span in trace.spans:
        lanes[span.rank, span.lane].append(span)
    for rank, order in enumerate(schedule.compute):
        spans = sorted(lanes[rank, "compute"], key=lambda s: (s.start, s.end))
        seconds = {display_name(a): cost.seconds(rank, a) for a in order if a.kind != "S"}
        seconds["synchronise 0"] = cost.synchronise_seconds
        assert {s.name: pytest.approx(s.end - s.start, abs=1e-9) for s in spans} == seconds
        assert trace.seconds >= sum(seconds.values()) - 1e-9
    for (_, lane), spans in lanes.items():
        if lane.endswith(("stage", "stage before")):
            continue  # what a rank gets and what it sends may overlap
        spans.sort(key=lambda s: (s.start, s.end))
        assert all(first.end <= second.start + 1e-9 for first, second in itertools.pairwise(spans))
    for transfer in schedule.transfers:
        ranks = {*schedule.senders[transfer], *schedule.receivers[transfer]}
        spans = [s for s in trace.spans if s.name == str(transfer)]
        assert {s.rank for s in spans} == ranks
        assert len({(s.start, s.end) for s in spans}) == 1
        assert spans[0].end - spans[0].start == pytest.approx(cost.transfer(transfer).seconds, abs=1e-9)


@given(any_layouts())
def test_no_task_starts_before_its_inputs_have_ended(layout: Layout) -> None:
    schedule = training_schedule(layout)
    trace = simulate(make_cost(layout), schedule)
    span_of = {(s.rank, s.name): s for s in trace.spans}
    for rank, order in enumerate(schedule.compute):
        for action in order:
            for source in inputs(action, layout.layers):
                if rank in schedule.receivers.get(source, ()):
                    assert span_of[rank, str(source)].end <= span_of[rank, display_name(action)].start
    for transfer in schedule.transfers:
        for rank in schedule.senders[transfer]:
            names = [(rank, display_name(source)) for source in schedule.sources(transfer, layout.layers)]
            made = [span_of[name].end for name in names if name in span_of]
            assert made or transfer.kind is Kind.GATHER
            assert max(made, default=0.0) <= span_of[rank, str(transfer)].start


@given(any_layouts())
def test_every_task_starts_at_time_zero_or_when_another_ends(layout: Layout) -> None:
    trace = simulate(make_cost(layout))
    ends = {span.end for span in trace.spans} | {0.0}
    assert {span.start for span in trace.spans} <= ends


@given(any_layouts())
def test_a_recorded_balanced_load_gives_the_balanced_timeline(layout: Layout) -> None:
    cost = make_cost(layout)
    counts = np.zeros((layout.world_size, layout.layers, layout.micro_batches, layout.experts), dtype=np.int64)
    for rank, sequences in enumerate(layout.sequences_per_rank):
        own = np.ix_(layout.span_of(rank).layers, layout.shifts[rank] if layout.shifts else range(layout.micro_batches))
        counts[rank][own] = 60 * sequences  # 60 divides by every number of experts up to 5
    scale = cost.cost.rows_per_expert(1) / 60
    recorded = simulate(LayoutCost(cost.cost, layout, RecordedLoad(counts, scale)))
    for one, other in zip(simulate(cost).spans, recorded.spans, strict=True):
        assert other[:3] == one[:3]
        assert other[3:5] == pytest.approx(one[3:5])


def test_a_skewed_load_is_slower() -> None:
    layout = make_layout((1, 0, 0), (0, 2, 2))
    cost = make_cost(layout, model=make_model())
    counts = np.full((3, 2, 2, 4), 32)
    counts[1:] = 0
    counts[0, ..., 0], counts[0, ..., 1] = 62, 2  # the same host: no difference
    same = simulate(LayoutCost(cost.cost, layout, RecordedLoad(counts, 1.0))).seconds
    assert same == pytest.approx(simulate(cost).seconds)
    counts[0, ..., 1], counts[0, ..., 3] = 32, 2
    assert simulate(LayoutCost(cost.cost, layout, RecordedLoad(counts, 1.0))).seconds > same + 0.5


@pytest.mark.parametrize("schedule", ["zebra", "sequential"])
def test_twice_the_cost_takes_twice_the_time(schedule: str) -> None:
    layout = make_layout(schedule=schedule)  # type: ignore[arg-type]
    one, two = (simulate(cost_of(layout, hand_inputs(slowdown))) for slowdown in (1.0, 2.0))
    assert [s.end for s in two.spans] == pytest.approx([2 * s.end for s in one.spans])


@pytest.mark.parametrize("copies", [2, 3])
def test_a_group_of_equal_devices_scales_with_its_batch(copies: int) -> None:
    # Twice the attending ranks and twice the hosts of half the experts: the same rows and bytes on every device.
    model = make_model(experts=6)
    small = make_cost(make_layout((1, 0), (0, 6)), model=model)
    large = make_cost(make_layout([1] * copies + [0] * copies, [0] * copies + [6 // copies] * copies), model=model)

    def ends(cost: LayoutCost) -> dict[str, float]:
        late = ("synchronise", "optimizer")
        return {s.name: s.end for s in simulate(cost).spans if s.lane != "collectives" and not s.name.startswith(late)}

    assert ends(large) == pytest.approx(ends(small))


@given(any_layouts())
def test_a_faster_network_is_never_slower(layout: Layout) -> None:
    slow, fast = (Link(bandwidth_gigabytes_per_second=b, latency_microseconds=0) for b in (1e-5, 1e-3))
    seconds = [simulate(make_cost(layout, network=link, interconnect=link)).seconds for link in (slow, fast)]
    assert seconds[1] <= seconds[0]


@given(any_layouts(), st.integers(1, 3), st.integers(1, 2), st.booleans(), st.data())
def test_every_span_is_that_of_the_plainest_replay(
    layout: Layout, per_node: int, nics: int, balanced: bool, data: st.DataObject
) -> None:
    """Shared NICs, recorded loads, and orders that are not the layout's own."""
    world = layout.world_size
    nodes = [(data.draw(devices), min(per_node, world - first)) for first in range(0, world, per_node)]
    link = Link(bandwidth_gigabytes_per_second=1e-5, latency_microseconds=10)
    dense = {"dense_layers": 1, "dense_ffn_size": 96} if data.draw(st.booleans()) else {}
    model = make_model(layers=layout.layers, experts=layout.experts, top_k=1, **dense)
    cost = make_cost(layout, nodes, model=model, nics=nics, network=link, interconnect=link)
    if not balanced:
        size = (world, layout.layers, layout.micro_batches, layout.experts)
        counts = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 50, size)
        for rank, layer, j in itertools.product(range(world), range(layout.layers), range(layout.micro_batches)):
            counts[rank, layer, j] *= rank in layout.crew(layer, j)
        cost = LayoutCost(cost.cost, layout, RecordedLoad(counts, 1.5))
    schedule = training_schedule(layout, data.draw(st.integers(1, 2), label="groups"))
    rank = data.draw(st.integers(0, world - 1))
    order = swapped(schedule.compute[rank], data) if data.draw(st.booleans()) else schedule.compute[rank]
    schedule = replace(schedule, compute=(*schedule.compute[:rank], order, *schedule.compute[rank + 1 :]))
    expected = reference_spans(cost, schedule)
    if expected is None:
        with pytest.raises(UserError, match="deadlock"):
            simulate(cost, schedule)
        return
    trace = simulate(cost, schedule)
    assert sorted(trace.spans) == expected
    plain = Trace("simulated", expected)
    assert trace.seconds == plain.seconds
    assert trace.step_seconds() == plain.step_seconds()
    assert trace.busy_share(world) == pytest.approx(plain.busy_share(world))


def test_dense_layers_hold_up_the_first_dispatch() -> None:
    layout = make_layout()
    spans = {}
    for count in (0, 1):
        model = make_model(**({"dense_layers": count, "dense_ffn_size": 96} if count else {}))
        spans[count] = by_name(simulate(make_cost(layout, model=model)))
    assert spans[0]["0DF0"][0] == pytest.approx(1.0)
    assert spans[1]["0DF0"][0] == pytest.approx(1.0 + 1.5)
    later = [spans[count]["1AF0"][1] - spans[count]["1AF0"][0] for count in (0, 1)]
    assert later[0] == pytest.approx(later[1])


def test_an_answer_waits_for_its_senders_only() -> None:
    # Rank 0 runs its replica of the third expert after both attention tasks; the hosts' answer goes out before.
    layout = make_layout((1, 0), (0, 2), replicated=1)
    cost = make_cost(layout, model=make_model(experts=3))
    spans = simulate(cost).spans
    ends = {s.rank: s.end for s in spans if s.name == "0EF0"}
    assert {s.start for s in spans if s.name == "0CF0"} == {ends[1]}
    assert ends[1] < ends[0]


devices = st.sampled_from(["new", "old"])


def swapped(order: tuple[Action, ...], data: st.DataObject) -> tuple[Action, ...]:
    """Two neighbours in each other's place."""
    if len(order) < 2:
        return order
    first = data.draw(st.integers(0, len(order) - 2))
    return (*order[:first], order[first + 1], order[first], *order[first + 2 :])


def test_a_schedule_without_tasks_takes_no_time() -> None:
    trace = simulate(make_cost(make_layout()), Schedule(((), ()), (), {}, {}))
    assert (trace.seconds, trace.spans, trace.busy_share(2)) == (0.0, [], [0.0, 0.0])


DEADLOCK = """
rank 0: 1AF0 0AF0
rank 1: 0EF0
transfer 0DF0: 0 > 1
transfer 0CF0: 1 > 0
"""


def test_a_deadlock_names_a_task_that_never_starts() -> None:
    with pytest.raises(UserError, match="schedule: deadlock: 5 tasks never start, the first is rank 0 1AF0"):
        check_deadlock(parse_schedule(DEADLOCK), layers=2)
    check_deadlock(parse_schedule(DEADLOCK.replace("1AF0 0AF0", "0AF0 1AF0")), layers=2)


def test_a_deadlock_between_transfers_is_found() -> None:
    swapped = DEADLOCK.replace("1AF0 0AF0", "0AF0 1AF0").splitlines()
    swapped[-2:] = reversed(swapped[-2:])
    with pytest.raises(UserError, match="deadlock"):
        check_deadlock(parse_schedule("\n".join(swapped)), layers=2)


def test_a_transfer_without_answer_is_found() -> None:
    text = "rank 0: 0AF0\nrank 1: 0EF0\ntransfer 0DF0: 0 > 1\n"
    with pytest.raises(UserError, match="transfer 0DF0 has no answer 0CF0"):
        check_deadlock(parse_schedule(text), layers=1)


def test_a_schedule_other_than_the_layouts_own_is_replayed() -> None:
    cost = cost_of(make_layout(), hand_inputs())
    text = "rank 0: 0AF1 0AF0\nrank 1: 0EF1 0EF0\ntransfer 0DF1: 0 > 1\ntransfer 0DF0: 0 > 1\n"
    times = by_name(simulate(cost, parse_schedule(text)))
    assert times["0AF0"] == pytest.approx((1, 2))
    assert times["0EF1"] == pytest.approx((1.25, 3.25))
