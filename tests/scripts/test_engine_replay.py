"""A run against its own simulation: traces that the simulator makes differ from it by nothing, those of an engine that
dawdles by as much as it dawdles; waiting is no part of a transfer; exposure and stretch are what was put in."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from builders import make_cost, make_layout

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from engine_overlap import exposure, loads, stretch
from engine_replay import ALL, Iteration, Run, Seconds, StageTimes, compare, iterations, optimizer_first, stage_seconds
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import Link
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.trace import Span, Trace

PAIR = make_layout((2, 0), (0, 4), micro_batches=4)
EP = make_layout((1, 1), (2, 2), micro_batches=2)
STEPS, WAITING = 4, 1e-3
STAGES = ("ATTENTION", "EXPERT", "HEAD")
LINK = Link(bandwidth_gigabytes_per_second=1.0, latency_microseconds=1e5)  # tasks last about a second


def run_of(layout: Layout, *, dawdling: float = 0.0, seconds: Seconds | None = None) -> Run:
    """A run of STEPS steps on simulated devices; between two it does nothing for `dawdling` seconds.

    Receivers begin with a transfer before their senders do.
    """
    cost = make_cost(layout, [("new", 2)], interconnect=LINK)
    schedule = optimizer_first(training_schedule(layout))
    simulated = simulate(StageTimes(cost, seconds) if seconds else cost, schedule)
    trace = Trace("measured", [], {step: 100.0 + step for step in range(STEPS)})
    for step in range(STEPS):
        began = 7.0 + step * (simulated.seconds + dawdling)
        for span in simulated.spans:
            of = step - 1 if span.name == "optimizer 0" else step
            waiting = _receives_only(schedule.senders, span) * WAITING
            shift = began - trace.starts.get(of, 0.0)
            if of >= 0:
                trace.spans.append(span._replace(start=span.start + shift - waiting, end=span.end + shift, step=of))
    return Run(schedule, cost, iterations(trace))


def _receives_only(senders: dict[object, tuple[int, ...]], span: Span) -> bool:
    return any(str(transfer) == span.name and span.rank not in ranks for transfer, ranks in senders.items())


@pytest.mark.parametrize("layout", [PAIR, EP], ids=["pair", "ep"])
def test_loads_are_the_seconds_of_every_ranks_stages(layout: Layout) -> None:
    run = run_of(layout)
    stages = [[action for action in order if action.kind.name in STAGES] for order in run.schedule.compute]
    expected = [sum(run.cost.seconds(rank, action) for action in order) for rank, order in enumerate(stages)]
    assert loads(run) == pytest.approx(expected)
    assert (layout is PAIR) is (abs(expected[0] / expected[1] - 1) > 1e-6)


@pytest.mark.parametrize("layout", [PAIR, EP], ids=["pair", "ep"])
def test_a_simulated_run_is_as_fast_as_its_simulation(layout: Layout) -> None:
    run = run_of(layout)
    assert [iteration.step for iteration in run.iterations] == [1, 2, 3]
    found = compare(run)
    assert found.iteration_seconds == pytest.approx(simulate(run.cost, run.schedule).seconds)
    assert found.excess == pytest.approx(0.0, abs=1e-9)
    assert found.excess_by_medians == pytest.approx(0.0, abs=1e-9)


def test_time_outside_all_stages_is_excess() -> None:
    seconds = compare(run_of(PAIR)).iteration_seconds
    found = compare(run_of(PAIR, dawdling=0.25 * seconds))
    assert found.excess == pytest.approx(0.25)
    assert found.excess_by_medians == pytest.approx(0.25)


def test_waiting_for_a_sender_is_no_part_of_a_transfer() -> None:
    run = run_of(PAIR)
    seconds = stage_seconds(run.schedule, run.iterations[0].spans)
    for transfer in run.schedule.transfers:
        assert seconds[str(transfer), ALL] == pytest.approx(run.cost.transfer(transfer).seconds)
    assert seconds["0AF0", 0] == pytest.approx(run.cost.seconds_by_rank(run.schedule.compute[0][1])[0])
    assert ("0AF0", 1) not in seconds


def test_nothing_is_hidden_where_nothing_overlaps() -> None:
    run = run_of(make_layout((1, 0), (0, 4), micro_batches=1))
    for ranks in ([0], [1], [0, 1]):
        assert exposure(run, ranks).hidden == pytest.approx(0.0, abs=1e-9)
    total = sum(run.cost.transfer(transfer).seconds for transfer in run.schedule.transfers)
    assert exposure(run, [0, 1]).transfer_seconds == pytest.approx(total)
    assert compare(run).free_transfers == pytest.approx(-total / run.seconds)


def test_a_transfer_is_hidden_while_its_receiver_works() -> None:
    run = run_of(make_layout((1, 0), (0, 4), micro_batches=1))
    moving = run.cost.transfer(run.schedule.transfers[0]).seconds
    before = exposure(run, [1])
    found = exposure(replace(run, iterations=[_busy_until_half(one, moving) for one in run.iterations]), [1])
    assert before.exposed_seconds - found.exposed_seconds == pytest.approx(0.5 * moving)
    assert found.transfer_seconds == pytest.approx(before.transfer_seconds)


def _busy_until_half(iteration: Iteration, moving: float) -> Iteration:
    """The hosting rank's optimizer ends in the middle of the first dispatch."""
    optimizer, dispatch = iteration.spans["optimizer 0", 1], iteration.spans["0DF0", 1]
    busy = optimizer._replace(end=dispatch.end - 0.5 * moving)
    return replace(iteration, spans=iteration.spans | {("optimizer 0", 1): busy})


def test_stretch_is_how_much_longer_stages_last() -> None:
    alone = run_of(make_layout((2, 0), (0, 4), micro_batches=4, schedule="sequential"))
    seconds = stage_seconds(alone.schedule, alone.iterations[0].spans)
    longer = {key: 1.2 * value for key, value in seconds.items()}
    assert stretch(run_of(PAIR, seconds=seconds), alone) == pytest.approx(0.0, abs=1e-9)
    assert stretch(run_of(PAIR, seconds=longer), alone) == pytest.approx(0.2)
