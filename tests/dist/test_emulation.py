"""Emulated time is the cost model's time for the rows really sent; it can be longer (overruns), never shorter."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from workers import run_workers

from builders import make_inputs, make_layout, make_model, make_plan, make_profile, sequential
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.load import CountedLoad, RecordedLoad
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.model.data.corpus import Batches
from hetermoe_cli.planner.cluster.replayed import Replayed, replay_groups
from hetermoe_cli.schedule.lower import training_schedules
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import LayerPlacement, Layout, PipelineStage
from hetermoe_cli.spec.plan import Group, Plan
from hetermoe_cli.spec.run import Emulation, RunSpec
from hetermoe_cli.spec.train import DenseState, Dispatch
from hetermoe_cli.trace import LANES, Span, Trace, display_name

NOMINAL = make_model(layers=2, experts=4)
EXECUTED = make_model(layers=2, experts=4, hidden_size=16, ffn_size=16, head_size=4)
STEPS, LENGTH, SCALE = 2, 32, 12.0


def make_run(
    folder: Path,
    sequences: tuple[int, ...],
    hosted: tuple[int, ...],
    state: DenseState = "replicated",
    dispatch: Dispatch = "per_expert",
    layout: Layout | None = None,
) -> RunSpec:
    """Tasks of 12 ms and more, so that their small real work fits. `layout`: instead of one of these sequences."""
    profiles = {
        name: make_profile(name, model=NOMINAL, attention_seconds=1e-3 * slow, expert_seconds=4e-5 * slow,
                           head_seconds=2e-5, optimizer_seconds_per_parameter=1e-9)
        for name, slow in (("new", 1), ("old", 2))
    }  # fmt: skip
    layout = layout or make_layout(sequences, hosted, replicated=4 - sum(hosted), dense_state=state)
    schedule = layout.schedule.model_copy(update={"dispatch": dispatch})
    layout = layout.model_copy(update={"schedule": schedule})
    inputs = make_inputs(
        (("new", len(sequences) // 2), ("old", len(sequences) - len(sequences) // 2)),
        model=NOMINAL,
        profiles=profiles,
        global_batch_sequences=layout.sequences_per_micro_batch * layout.micro_batches,
        dispatch=dispatch,
    )
    return RunSpec(
        plan=make_plan(inputs, layout),
        folder=str(folder),
        corpus_sha256="",
        precision="fp32",
        steps=STEPS,
        emulation=Emulation(executed=EXECUTED, sequence_length=LENGTH, time_scale=SCALE),
    )


Sent = dict[tuple[int, int, int], list[int]]  # (step, layer, micro-batch): rows to every rank


def work(rank: int, run: RunSpec) -> tuple[list[Span], list[np.ndarray], int, Sent]:
    from hetermoe_cli.runtime.clocks.emulator import EmulatedClock
    from hetermoe_cli.runtime.clocks.moment import common_moment
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.step.trainer import Trainer
    from hetermoe_cli.runtime.transfers.dispatcher import Routing
    from hetermoe_cli.schedule.lower import training_schedules

    world = run.world
    mesh = join(world, "cpu")
    train = run.plan.inputs.train
    trainer = Trainer.build(run.model, world, train, mesh, sequence_length=LENGTH, precision="fp32")
    clock = trainer.clock = EmulatedClock(run, training_schedules(world)[world.seat(rank)[0]], rank)
    tokens = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    batches = Batches([tokens], LENGTH, train.global_batch_sequences, 0)
    counts, sent, told = [], {}, clock.counted

    def counted(layer: int, micro_batch: int, routing: Routing) -> None:
        sent[len(counts), layer, micro_batch] = routing.sizes
        told(layer, micro_batch, routing)

    clock.counted = counted  # type: ignore[method-assign]
    clock.set_zero(common_moment(mesh.wire))
    for step in range(STEPS):
        trainer.step(batches, step, record=True)
        counts.append(trainer.engine.counts.copy())
    return clock.spans, counts, clock.overruns, sent


def rows_by_rank(sent: list[Sent], step: int, scale: float, layer: int, micro_batch: int) -> np.ndarray:
    """rows [world, world]."""
    return np.array([own.get((step, layer, micro_batch), [0] * len(sent)) for own in sent]) * scale


@pytest.mark.parametrize(
    ("sequences", "hosted", "state", "dispatch"),
    [
        ((1, 0), (0, 4), "replicated", "per_expert"),
        pytest.param((2, 1), (1, 2), "replicated", "per_expert", marks=pytest.mark.long),
        ((1, 1, 0, 0), (0, 0, 2, 2), "replicated", "per_expert"),
        ((1, 1, 0, 0), (1, 0, 1, 2), "replicated", "per_device"),
        ((2, 1), (1, 2), "full", "per_device"),
        pytest.param((1, 1, 0), (0, 0, 4), "full", "per_expert", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_emulated_tasks_take_the_cost_of_their_rows(
    tmp_path: Path, sequences: tuple[int, ...], hosted: tuple[int, ...], state: DenseState, dispatch: Dispatch
) -> None:
    check(make_run(tmp_path, sequences, hosted, state, dispatch))


def test_emulated_pipeline_stages_take_the_cost_of_their_rows(tmp_path: Path) -> None:
    placement = [LayerPlacement(experts=[[0, 1, 2, 3], [], []]), LayerPlacement(experts=[[], [0], [1, 2, 3]])]
    stages = [PipelineStage(layers=1, ranks=[0]), PipelineStage(layers=1, ranks=[1, 2])]
    schedule = sequential(3)
    layout = Layout(schedule=schedule, sequences_per_rank=[2, 1, 1], placement=placement, pipeline=stages)
    check(make_run(tmp_path, (2, 1, 1), (4, 1, 3), layout=layout))


def test_emulated_shifts_take_the_cost_of_their_rows(tmp_path: Path) -> None:
    """New weights arrive with the first micro-batch, which one rank is not on."""
    plain = make_layout((1, 1, 0), (0, 1, 3), micro_batches=4, schedule="windowed", dense_state="optimizer")
    layout = Layout.model_validate(plain.model_dump() | {"shifts": [[0, 1, 3], [2], []]})
    check(make_run(tmp_path, (1, 1, 0), (0, 1, 3), layout=layout))


def test_emulated_heads_apart_take_the_cost_of_their_tokens(tmp_path: Path) -> None:
    plain = make_layout((1, 1, 0), (0, 1, 3), micro_batches=4, schedule="windowed", dense_state="optimizer")
    layout = Layout.model_validate(plain.model_dump() | {"head": [1, 0, 2]})
    check(make_run(tmp_path, (1, 1, 0), (0, 1, 3), layout=layout))


def check(run: RunSpec) -> None:
    ranks = run_workers(run.plan.layout.world_size, work, run)
    emulated = Trace("emulated", [span for spans, *_ in ranks for span in spans])
    overruns = sum(count for _, _, count, _ in ranks)
    cost = CostModel(run.plan.inputs)
    exact = total = 0
    for step in range(STEPS):
        by_expert = RecordedLoad(np.stack([counts[step] for _, counts, *_ in ranks]), run.row_scale)
        load = CountedLoad(by_expert, partial(rows_by_rank, [sent for *_, sent in ranks], step, run.row_scale))
        simulated = simulate(LayoutCost(cost, run.plan.layout, load))
        wanted = {(s.rank, s.lane, s.name): (s.end - s.start) * SCALE for s in simulated.spans}
        found = {(s.rank, s.lane, s.name): s.end - s.start for s in emulated.spans if s.step == step}
        assert found.keys() == wanted.keys()
        for key, seconds in wanted.items():
            assert found[key] >= seconds - 1e-6, key
            total += 1
            exact += found[key] <= seconds + 1e-6
        measured = emulated.step_seconds()[step]
        assert measured >= simulated.seconds * SCALE - 0.01  # ranks leave the barrier some milliseconds apart
        if not overruns and step == 0:  # later steps overlap the optimizer of the one before
            assert measured == pytest.approx(simulated.seconds * SCALE, rel=0.02)
    assert exact >= total - overruns


def grouped(run: RunSpec, groups: list[Group]) -> tuple[RunSpec, Replayed]:
    """The run with `groups` in place of its layout, and their replay."""
    cluster = run.plan.inputs.cluster
    nodes = [node.model_copy(update={"nics": node.devices}) for node in cluster.nodes]  # groups share no NIC
    inputs = run.plan.inputs.model_copy(update={"cluster": cluster.model_copy(update={"nodes": nodes})})
    changes = {"groups": groups, "max_groups": None, "inputs": inputs}
    plan = Plan.model_validate(run.plan.model_copy(update=changes).model_dump())
    return run.model_copy(update={"plan": plan}), replay_groups(plan.inputs, groups)


def test_groups_sum_their_gradients_when_the_last_of_them_is_ready(tmp_path: Path) -> None:
    """Unequal groups: every R ends at one moment in both."""
    run = make_run(tmp_path, (3, 0, 0), (0, 4, 0))
    groups = [
        Group.of(make_layout((2, 0), (0, 4)), [[0, 2]]),
        Group.of(make_layout((1,), (4,)), [[1]]),
    ]
    run, replayed = grouped(run, groups)
    ranks = run_workers(3, work, run)
    schedules = training_schedules(run.world)
    assert [len({span.rank for span in spans}) for spans, *_ in ranks] == [1, 1, 1]
    overruns = sum(count for _, _, count, _ in ranks)
    for step in range(STEPS):
        ends: dict[str, set[float]] = {}
        for rank, (spans, *_) in enumerate(ranks):
            mine = [span for span in spans if span.step == step]
            schedule = schedules[run.world.seat(rank)[0]]
            local = run.world.replica_of(rank).processes.index(rank)
            tasks = [*schedule.compute[local], *schedule.transfers_of(local)]
            assert sorted(span.name for span in mine) == sorted(map(display_name, tasks))
            for span in mine:
                if span.lane == LANES[3]:
                    ends.setdefault(span.name, set()).add(round(span.end, 9))
        assert len(ends) == 3  # two layers and the head
        assert all(len(found) == 1 for found in ends.values()), ends
    seconds = Trace("emulated", [span for spans, *_ in ranks for span in spans]).step_seconds()[0]
    if not overruns:  # the pair is the last one throughout, so that its replay is right
        slow, fast = (g.computed for g in replayed.groups)
        assert slow > fast
        assert seconds == pytest.approx(replayed.seconds * SCALE, rel=0.05)
