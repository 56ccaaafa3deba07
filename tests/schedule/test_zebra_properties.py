"""Properties of every schedule that zebra.py and lower.py can make, on random layouts."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import ceil

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from builders import any_layouts, in_shifts, layouts, make_cost, make_layout, pipelines
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Action, Kind, Pass, parse_action
from hetermoe_cli.schedule.gathers import releases
from hetermoe_cli.schedule.lower import training_schedule, validation_schedule
from hetermoe_cli.schedule.schedule import Schedule, gather_for, inputs, segment_of
from hetermoe_cli.simulator import check_deadlock, simulate
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.trace import Span

FORWARD, BACKWARD = Pass.FORWARD, Pass.BACKWARD


def expected_compute(layout: Layout, rank: int, passes: tuple[Pass, ...]) -> Counter[Action]:
    """The tasks of a rank, counted from the layout alone."""
    micro_batches = range(layout.micro_batches)
    attended = layout.shifts[rank] if layout.shifts else micro_batches
    heads = layout.head[rank] if layout.head else layout.attends(rank, layout.layers - 1)
    tasks = [Action(Kind.HEAD, passes[-1], 0, j) for j in (micro_batches if layout.head else attended) if heads]
    borders = borders_of(layout)
    for direction in passes:
        ended = [border for border in borders if layout.attends(rank, border - 1)]
        tasks += [Action(Kind.PASS, direction, border, j) for border in ended for j in attended]
        for layer in range(layout.layers):
            if layout.attends(rank, layer):
                tasks += [Action(Kind.ATTENTION, direction, layer, j) for j in attended]
            if layout.local_experts(layer, rank):
                tasks += [Action(Kind.EXPERT, direction, layer, j) for j in micro_batches]
    if BACKWARD in passes:
        tasks += [Action(Kind.SYNCHRONISE, BACKWARD), Action(Kind.OPTIMIZER, BACKWARD)]
    return Counter(tasks)


def borders_of(layout: Layout) -> list[int]:
    """The layers before which hidden states go to other ranks; one after the last one: the head."""
    return [span.end for span in layout.spans if span.ahead or layout.head]


def on_shift(layout: Layout, layer: int, micro_batch: int) -> tuple[int, ...]:
    """Ranks that attend in a layer to a micro-batch; one after the last layer, that compute the head."""
    ranks = layout.attending_at(layer)
    if layer == layout.layers and layout.head:
        return ranks
    return tuple(rank for rank in ranks if not layout.shifts or micro_batch in layout.shifts[rank])


def travels(layout: Layout, layer: int, micro_batch: int) -> bool:
    """Whether any row of the layer and micro-batch leaves its device."""
    hosts = layout.hosting(layer)
    return any(host != rank for host in hosts for rank in on_shift(layout, layer, micro_batch))


def expected_transfers(layout: Layout, passes: tuple[Pass, ...]) -> Counter[Action]:
    """Of rows, and all-reduces."""
    several = [layer for layer in range(layout.layers + 1) if len(layout.attending_at(layer)) > 1]
    reduces = several if BACKWARD in passes else ()
    crossings = [
        (direction, border, j)
        for direction in passes
        for border in borders_of(layout)
        for j in range(layout.micro_batches)
        if len({*on_shift(layout, border - 1, j), *on_shift(layout, border, j)}) > 1
    ]
    width = layout.schedule.window if layout.gathers else layout.micro_batches
    lasts = range(width - 1, layout.micro_batches, width)
    moved = Counter(Action(Kind.REDUCE, BACKWARD, layer, last) for layer in reduces for last in lasts)
    moved += Counter(Action(Kind.CROSS, *crossing) for crossing in crossings)
    return moved + Counter(
        Action(kind, direction, layer, j)
        for layer in range(layout.layers)
        for j in range(layout.micro_batches)
        if travels(layout, layer, j)
        for kind in (Kind.DISPATCH, Kind.COMBINE)
        for direction in passes
    )


@given(any_layouts())
def test_every_task_exactly_once(layout: Layout) -> None:
    for schedule, passes in (
        (training_schedule(layout), (FORWARD, BACKWARD)),
        (validation_schedule(layout), (FORWARD,)),
    ):
        for rank, order in enumerate(schedule.compute):
            assert Counter(order) == expected_compute(layout, rank, passes)
        moved = (transfer for transfer in schedule.transfers if transfer.kind is not Kind.GATHER)
        assert Counter(moved) == expected_transfers(layout, passes)


@given(any_layouts())
def test_attending_ranks_and_hosts_take_part_in_transfers(layout: Layout) -> None:
    schedule = training_schedule(layout)
    for transfer in schedule.transfers:
        first = layout.attending_at(transfer.layer)
        if transfer.kind is Kind.CROSS:
            second = on_shift(layout, transfer.layer - 1, transfer.micro_batch)
            forwards = transfer.direction is BACKWARD
        else:
            second = first if transfer.is_collective else tuple(layout.hosting(transfer.layer))
            first = first if transfer.is_collective else on_shift(layout, transfer.layer, transfer.micro_batch)
            forwards = transfer.towards_experts
        ends = (schedule.senders[transfer], schedule.receivers[transfer])
        assert ends == ((first, second) if forwards else (second, first))


@given(pipelines())
def test_no_rank_keeps_more_windows_than_it_must(layout: Layout) -> None:
    """1F1B: as many as stages follow, and the one at work, which may be woven into one that goes forward."""
    for rank, order in enumerate(training_schedule(layout).compute):
        tasks = [(a.direction, a.micro_batch // layout.schedule.window) for a in order[:-2]]
        ends = {number: place for place, (way, number) in enumerate(tasks) if way is BACKWARD}
        begins = {number: place for place, (_, number) in reversed([*enumerate(tasks)])}
        kept = [sum(begins[n] <= place <= ends[n] for n in begins) for place in range(len(tasks))]
        assert max(kept, default=ceil(layout.windows_in_flight(rank))) == ceil(layout.windows_in_flight(rank))
        for direction in (FORWARD, BACKWARD):
            numbers = [number for way, number in tasks if way is direction]
            assert numbers == sorted(numbers)


@given(pipelines())
def test_gradients_are_summed_behind_what_an_earlier_stage_waits_for(layout: Layout) -> None:
    transfers = training_schedule(layout, copies=2).transfers
    for span in layout.spans[1:]:
        layers = [*span.layers, *([] if span.ahead else [layout.layers])]
        crossed = max(transfers.index(Action(Kind.CROSS, BACKWARD, span.first, j)) for j in range(layout.micro_batches))
        summed = [transfers.index(Action(Kind.REDUCE, BACKWARD, layer, layout.micro_batches - 1)) for layer in layers]
        assert crossed < min(summed)


@given(in_shifts(), st.integers(1, 2))
def test_ranks_give_gradients_after_their_own_last_backward(layout: Layout, copies: int) -> None:
    schedule, layers = training_schedule(layout, copies), layout.layers
    for transfer in schedule.transfers:
        if transfer.kind is Kind.REDUCE:
            kind = Kind.HEAD if transfer.layer == layers else Kind.ATTENTION
            layer = 0 if kind is Kind.HEAD else transfer.layer
            made = schedule.sources(transfer, layers)
            for rank in set(schedule.senders[transfer]) & set(layout.attending):
                assert Action(kind, BACKWARD, layer, layout.shifts[rank][-1]) in made


@given(in_shifts(), st.sampled_from([training_schedule, validation_schedule]))
def test_the_first_stage_of_every_rank_waits_for_new_weights(layout: Layout, of: Callable[..., Schedule]) -> None:
    layers, schedule = layout.layers, of(layout, 2)
    for rank in layout.attending:
        for layer in range(layers):
            first = Action(Kind.ATTENTION, FORWARD, layer, layout.shifts[rank][0])
            gather = Action(Kind.GATHER, FORWARD, layer, 0)
            assert gather in schedule.needs(first, layers)
            assert (gather in schedule.transfers) == layout.schedule.shares_states
    if layout.schedule.shares_states:
        ends = {(span.rank, span.name): span for span in simulate(make_cost(layout), schedule).spans}
        for (rank, name), span in ends.items():
            if span.lane == "compute" and name[1:3] == "AF":
                assert span.start >= ends[rank, f"{name[0]}GF0"].end


@given(in_shifts())
def test_shifts_of_all_are_none(layout: Layout) -> None:
    everyone = [[*range(layout.micro_batches)] if count else [] for count in layout.sequences_per_rank]
    plain, all_on = (layout.model_copy(update={"shifts": shifts}) for shifts in ([], everyone))
    for of in (training_schedule, validation_schedule):
        assert str(of(all_on)) == str(of(plain))


@given(any_layouts())
def test_one_window_is_woven_into_nothing(layout: Layout) -> None:
    whole = {"window": layout.micro_batches, "experts": "after", "transfers": "layered", "dense_state": "replicated"}
    in_turn, woven = (
        layout.model_copy(update={"schedule": layout.schedule.model_copy(update={**whole, "passes": passes})})
        for passes in ("in_turn", "woven")
    )
    assert str(training_schedule(woven)) == str(training_schedule(in_turn))


@given(layouts())
def test_weights_are_whole_for_every_stage_that_needs_them_and_at_most_two_segments_at_once(layout: Layout) -> None:
    layers = layout.layers
    for schedule in (training_schedule(layout), validation_schedule(layout)):
        gathers = {transfer for transfer in schedule.transfers if transfer.kind is Kind.GATHER}
        assert bool(gathers) == (layout.schedule.shares_states and len(layout.attending) > 1)
        if not layout.gathers:
            assert gathers <= {Action(Kind.GATHER, Pass.FORWARD, layer, 0) for layer in range(layers + 1)}
            assert len(gathers) in (0, layers + 1)
            assert not schedule.after
            continue
        order, whole = schedule.compute[layout.attending[0]], set()
        dropped = releases(schedule, order, layers)
        waiting = [gather for gather in gathers if gather not in schedule.after]
        for stage in order:
            whole |= {gather.layer for gather in waiting}  # as soon as there is room
            assert len(whole) <= 2
            if stage.kind in (Kind.ATTENTION, Kind.HEAD):
                assert segment_of(stage, layers) in whole
            if (segment := dropped.get(stage)) is not None:
                whole.remove(segment)
            waiting = [gather for gather, after in schedule.after.items() if after == stage]
            assert not whole & {gather.layer for gather in waiting}
        assert not whole


@given(pipelines())
def test_pipeline_stages_gather_in_the_order_in_which_they_need_new_weights(layout: Layout) -> None:
    schedule = layout.schedule.model_copy(update={"dense_state": "optimizer"})
    layout = Layout.model_validate({**dict(layout), "schedule": schedule})
    gathers = [action.layer for action in training_schedule(layout, 2).transfers if action.kind is Kind.GATHER]
    assert sorted(gathers) == list(range(layout.layers + 1))
    spans = [[*span.layers, *([layout.layers] if not span.ahead else [])] for span in layout.spans]
    for layers in spans:
        own = [layer for layer in gathers if layer in layers]
        assert own == sorted(own)
    firsts = [gathers.index(layers[0]) for layers in spans]
    assert firsts == sorted(firsts)


@given(layouts())
def test_a_stage_waits_for_the_gather_of_its_own_weights(layout: Layout) -> None:
    schedule = training_schedule(layout)
    cost = make_cost(layout)
    ends = {span.name: span.end for span in simulate(cost, schedule).spans}
    for span in simulate(cost, schedule).spans:
        if span.lane == "compute" and not span.name.startswith(("head", "synchronise", "optimizer")):
            gather = str(gather_for(parse_action(span.name), layout.layers))
            assert span.start >= ends.get(gather, 0.0) or span.name[-3] == "E"


@given(layouts(schedules=("zebra",)))
def test_zebra_is_layer_major_on_every_rank(layout: Layout) -> None:
    for order in training_schedule(layout).compute:
        for kind in (Kind.ATTENTION, Kind.EXPERT):
            forward = [(a.layer, a.micro_batch) for a in order if (a.kind, a.direction) == (kind, FORWARD)]
            backward = [(-a.layer, a.micro_batch) for a in order if (a.kind, a.direction) == (kind, BACKWARD)]
            assert forward == sorted(forward)
            assert backward == sorted(backward)


@given(layouts(schedules=("sequential",)))
def test_sequential_finishes_a_micro_batch_before_the_next(layout: Layout) -> None:
    assume(layout.schedule.passes == "in_turn")
    for order in training_schedule(layout).compute:
        numbers = [a.micro_batch for a in order[:-2]]
        assert numbers == sorted(numbers)


@given(any_layouts())
def test_all_ranks_pass_the_layers_forwards_then_backwards(layout: Layout) -> None:
    layers = layout.layers
    for order in training_schedule(layout).compute:
        for j in range(layout.micro_batches):
            chain = [chain_position(a, layers) for a in order[:-2] if a.micro_batch == j]
            assert chain == sorted(chain)
        assert [a.kind for a in order[-2:]] == [Kind.SYNCHRONISE, Kind.OPTIMIZER]


@given(any_layouts())
def test_no_deadlock(layout: Layout) -> None:
    check_deadlock(training_schedule(layout), layout.layers)
    check_deadlock(validation_schedule(layout), layout.layers)


@given(any_layouts(), st.integers(1, 3))
def test_no_deadlock_where_ranks_share_a_nic(layout: Layout, devices: int) -> None:
    nodes = [("new", min(devices, layout.world_size - first)) for first in range(0, layout.world_size, devices)]
    cost = make_cost(layout, nodes)
    assert simulate(cost).seconds > 0
    assert simulate(cost, validation_schedule(layout)).seconds > 0


@pytest.mark.parametrize("layers", [1, 2])
def test_sequential_validation_with_one_layer_does_not_deadlock(layers: int) -> None:
    # Regression: with one layer the next micro-batch's dispatch was put before the combine that its head waits for.
    layout = make_layout((1, 1), (1, 1), layers=layers, schedule="sequential")
    check_deadlock(validation_schedule(layout), layers)
    assert simulate(make_cost(layout), validation_schedule(layout)).seconds > 0


@given(layouts(), st.data())
def test_a_removed_transfer_is_found(layout: Layout, data: st.DataObject) -> None:
    schedule = training_schedule(layout)
    rows = [t for t in schedule.transfers if not t.is_collective]
    assume(rows)
    gone = data.draw(st.sampled_from(rows))
    mutant = replace(
        schedule,
        transfers=tuple(t for t in schedule.transfers if t != gone),
        senders={t: ranks for t, ranks in schedule.senders.items() if t != gone},
        receivers={t: ranks for t, ranks in schedule.receivers.items() if t != gone},
    )
    with pytest.raises(UserError, match=f"transfer {gone.answer} has no answer {gone}"):
        check_deadlock(mutant, layout.layers)


@given(layouts(), st.data())
def test_swapped_transfers_of_a_micro_batch_are_found(layout: Layout, data: st.DataObject) -> None:
    schedule = training_schedule(layout)
    order = list(schedule.transfers)
    assume([t for t in order if not t.is_collective])
    first, second = draw_pair(data, order)
    order[first], order[second] = order[second], order[first]
    with pytest.raises(UserError, match="deadlock"):
        check_deadlock(replace(schedule, transfers=tuple(order)), layout.layers)


@given(layouts(), st.data())
def test_swapped_dependent_tasks_are_found(layout: Layout, data: st.DataObject) -> None:
    schedule, layers = training_schedule(layout), layout.layers
    rank = data.draw(st.sampled_from([r for r, order in enumerate(schedule.compute) if len(order) > 2]))
    order = list(schedule.compute[rank])
    first, second = draw_pair(data, order[:-2])
    earlier, later = order[first], order[second]
    order[first], order[second] = later, earlier
    mutant = replace(schedule, compute=(*schedule.compute[:rank], tuple(order), *schedule.compute[rank + 1 :]))
    sends = any(rank in schedule.senders[t] and earlier in inputs(t, layers) for t in schedule.transfers)
    waits = any(rank in schedule.receivers.get(t, ()) for t in inputs(later, layers))
    if sends and waits:
        with pytest.raises(UserError, match="deadlock"):
            check_deadlock(mutant, layers)
    else:  # the two depend on each other only through the rank's own order, which the replay takes as given
        cost = make_cost(layout)
        assert timeline_or_nothing(cost, mutant) != sorted(simulate(cost, schedule).spans)


def timeline_or_nothing(cost: LayoutCost, schedule: Schedule) -> list[Span]:
    try:
        return sorted(simulate(cost, schedule).spans)
    except UserError:
        return []


def draw_pair(data: st.DataObject, order: list[Action]) -> tuple[int, int]:
    """Indices of two tasks of one micro-batch, collectives left out: they are no part of its chain."""
    chained = [(index, action) for index, action in enumerate(order) if not action.is_collective]
    micro_batch = data.draw(st.sampled_from(chained))[1].micro_batch
    places = [index for index, action in chained if action.micro_batch == micro_batch]
    assume(len(places) > 1)
    pair = data.draw(st.lists(st.sampled_from(places), min_size=2, max_size=2, unique=True))
    return min(pair), max(pair)


def chain_position(action: Action, layers: int) -> int:
    """Place of a task in its micro-batch's one chain of dependencies."""
    if action.kind is Kind.HEAD:
        return 4 * layers
    if action.kind is Kind.PASS:
        return 4 * action.layer - 1 if action.direction is FORWARD else 4 * (2 * layers - action.layer)
    if action.direction is FORWARD:
        return 4 * action.layer + [Kind.ATTENTION, Kind.DISPATCH, Kind.EXPERT, Kind.COMBINE].index(action.kind)
    from_last = layers - 1 - action.layer
    place = [Kind.COMBINE, Kind.EXPERT, Kind.DISPATCH, Kind.ATTENTION].index(action.kind)
    return 4 * layers + 1 + 4 * from_last + place
