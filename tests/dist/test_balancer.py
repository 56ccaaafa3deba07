"""A run that rebalances in its middle tells, decides, moves, and trains like one that does not and like one device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from single_device import trained
from test_engine_equality import LENGTH, MODEL, arrays, batches
from workers import run_workers

from builders import make_groups_plan, make_inputs, make_layout, make_plan, make_profile
from hetermoe_cli.model.transformer import named_tensors
from hetermoe_cli.model.weights.training_state import training_tensors
from hetermoe_cli.planner.rebalancing.drift import NAMED
from hetermoe_cli.runtime.run.recorder import read_rebalances
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import LayerPlacement, PipelineStage
from hetermoe_cli.spec.plan import Plan, world_of
from hetermoe_cli.spec.run import Emulation, RunSpec
from hetermoe_cli.spec.train import TrainSpec
from train_command import events

STEPS, EVERY = 12, 3
TRAIN = TrainSpec(
    sequence_length=LENGTH,
    global_batch_sequences=8,
    precision="fp32",
    steps=STEPS,
    warmup_steps=2,
    learning_rate=3e-3,
    seed=3,
)


def one_group(experts: float) -> Plan:
    """Two ranks attend, two host three experts a layer, which take `experts` seconds a row (modelled)."""
    layout = make_layout((2, 2, 0, 0), (0, 0, 3, 3), layers=MODEL.layers, micro_batches=2)
    return make_plan(inputs({"new": (4, experts)}), layout)


def two_groups(experts: float) -> Plan:
    """One rank with two hosts, and on devices that are three times as slow one that hosts as well, with another."""
    pair = make_layout((3, 0, 0), (0, 3, 3), layers=MODEL.layers, micro_batches=2)
    other = make_layout((1, 0), (3, 3), layers=MODEL.layers, micro_batches=2)
    devices = inputs({"new": (3, experts), "old": (2, 3 * experts)})
    return make_groups_plan(devices, (pair, [[0, 1, 2]]), (other, [[3, 4]]))


def two_stages(experts: float) -> Plan:
    """Two stages of two ranks; of the second one rank attends."""
    whole = make_layout((1, 1, 2, 0), (2, 1, 1, 2), layers=MODEL.layers, micro_batches=4)
    first, second = (
        LayerPlacement(experts=[[0, 1, 2], [3, 4, 5], [], []]),
        LayerPlacement(experts=[[], [], [3, 4, 5], [0, 1, 2]]),
    )
    stages = [PipelineStage(layers=1, ranks=[0, 1]), PipelineStage(layers=MODEL.layers - 1, ranks=[2, 3])]
    placement = [first, *[second] * (MODEL.layers - 1)]
    return make_plan(
        inputs({"new": (4, experts)}), whole.model_copy(update={"placement": placement, "pipeline": stages})
    )


def inputs(types: dict[str, tuple[int, float]]) -> Inputs:
    """A node of each device type: devices, and what an expert takes a row."""
    profiles = {
        name: make_profile(
            name,
            model=MODEL,
            sequence_lengths=(LENGTH,),
            precision="fp32",
            attention_seconds=0.01,
            expert_seconds=seconds,
        )
        for name, (_, seconds) in types.items()
    }
    nodes = [(name, count) for name, (count, _) in types.items()]
    made = make_inputs(nodes, model=MODEL, profiles=profiles, sequence_length=LENGTH, global_batch_sequences=8,
                       precision="fp32")  # fmt: skip
    return made.model_copy(update={"train": TRAIN})


def make_run(
    folder: Path,
    *,
    rebalance: bool,
    experts: float = 0.02,
    emulate: bool = False,
    plan: Callable[[float], Plan] = one_group,
    **options: Any,
) -> RunSpec:
    executed = {"executed": MODEL, "sequence_length": LENGTH, "time_scale": 0.02}
    return RunSpec(
        plan=plan(experts),
        folder=str(folder),
        corpus_sha256="",
        precision="fp64",
        steps=STEPS,
        drift_every=EVERY,
        rebalance=rebalance,
        emulation=Emulation(**executed) if emulate else None,
        **options,
    )


def skew(parts: torch.nn.Module) -> None:
    """Gates mostly choose the first three experts, which all lie on rank 2."""
    with torch.no_grad():
        for name, tensor in named_tensors(parts).items():
            if name.endswith("gate.weight"):
                tensor[:3] *= 20


def work(rank: int, run: RunSpec) -> tuple[list[float], dict[str, np.ndarray], list[list[int]], list[int]]:
    """Losses, the state at the end, the experts hosted then, and the spans' steps."""
    from hetermoe_cli.runtime.clocks.emulator import EmulatedClock
    from hetermoe_cli.runtime.clocks.moment import common_moment
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.run.balancer import Balancer
    from hetermoe_cli.runtime.run.recorder import Recorder
    from hetermoe_cli.runtime.step.trainer import Trainer
    from hetermoe_cli.schedule.lower import training_schedules

    mesh = join(run.world, "cpu")
    trainer = Trainer.build(run.model, run.world, TRAIN, mesh, sequence_length=LENGTH, precision="fp64")
    skew(trainer.parts)
    if run.emulation:
        copy, _ = run.world.seat(rank)
        trainer.clock = EmulatedClock(run, training_schedules(run.world)[copy], rank)
    balancer = Balancer(run, trainer, Recorder(run, rank))
    trainer.clock.set_zero(common_moment(mesh.wire))
    losses = []
    for step in range(STEPS):
        result = trainer.step(batches(), step, record=bool(run.emulation))
        losses.append(result.loss)
        if step + 1 < STEPS:
            balancer.after(step + 1, result)
    state = arrays({name: t.clone() for name, t in training_tensors(trainer.parts, trainer.optimizer).items()})
    hosted = [trainer.parts.experts_of(layer).hosted.ids for layer in range(MODEL.layers)]
    return losses, state, hosted, sorted({span.step for span in trainer.clock.spans})


def reference() -> tuple[list[float], dict[str, np.ndarray]]:
    model, optimizer, losses = trained(TRAIN, skew)
    return losses, arrays(training_tensors(model, optimizer))


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    for name in ("moving", "still"):
        (tmp_path / name).mkdir()


def test_a_rebalanced_run_equals_the_reference_and_a_run_without(tmp_path: Path) -> None:
    run = make_run(tmp_path / "moving", rebalance=True)
    moving = run_workers(4, work, run)
    still = run_workers(4, work, make_run(tmp_path / "still", rebalance=False))

    changes = read_rebalances(tmp_path / "moving")
    assert changes, "no rebalance happened"
    assert changes[0].step == EVERY
    assert changes[0].is_of(run.plan.groups)
    for rank, (*_, hosted, _) in enumerate(moving):
        assert hosted == [placement.experts[rank] for placement in changes[-1].groups[0].placement]
    assert [hosted for *_, hosted, _ in moving] != [hosted for *_, hosted, _ in still]

    told = events(tmp_path / "moving", "drift")[0]
    assert (told["step"], told["since_step"]) == (EVERY - 1, EVERY // 2)
    hottest = told["departures"][0]
    assert (hottest["rank"], hottest["device"]) == (2, "new")
    assert hottest["factor"] > 1.3
    decided = events(tmp_path / "moving", "rebalance")[0]
    assert decided["after_seconds"] < decided["before_seconds"]
    assert decided["moved"] == changes[0].moved > 0

    assert not (tmp_path / "still/rebalances.yaml").exists()
    assert not events(tmp_path / "still", "rebalance")
    assert "--rebalance moves experts where that pays" in events(tmp_path / "still", "drift")[0]["message"]

    losses, expected = reference()
    merged: list[dict[str, np.ndarray]] = [{}, {}]
    for seen, ranks in zip(merged, (moving, still), strict=True):
        for found, state, _, _ in ranks:
            np.testing.assert_allclose(found, losses, rtol=0, atol=1e-9)
            seen |= state
    assert merged[0].keys() == merged[1].keys()
    for name, value in expected.items():
        for seen in merged:
            np.testing.assert_allclose(seen[name], value, rtol=0, atol=1e-9, err_msg=name)


def test_groups_of_unequal_size_rebalance_and_equal_the_reference(tmp_path: Path) -> None:
    """Each moves its own experts at the same step; every rank of both ends with the single device's states."""
    run = make_run(tmp_path / "moving", rebalance=True, plan=two_groups)
    ranks = run_workers(5, work, run)

    changes = read_rebalances(tmp_path / "moving")
    assert changes, "no rebalance happened"
    assert changes[0].is_of(run.plan.groups)
    before, after = ([group.placement for group in groups] for groups in (run.plan.groups, changes[0].groups))
    assert all(old != new for old, new in zip(before, after, strict=True))
    world = world_of(changes[-1].groups)
    for process, (*_, hosted, _) in enumerate(ranks):
        copy, rank = world.seat(process)
        assert hosted == [placement.experts[rank] for placement in world.replicas[copy].layout.placement]

    told = events(tmp_path / "moving", "drift")[0]
    departed = {(found["rank"], found["group"], found["device"]) for found in told["departures"]}
    assert departed >= {(1, 0, "new"), (3, 1, "old")}
    for found in told["departures"][:NAMED]:
        assert f"rank {found['rank']} ({found['device']}, group {found['group']}) gets" in told["message"]

    losses, expected = reference()
    seen: set[str] = set()
    for own, state, _, _ in ranks:
        np.testing.assert_allclose(own, losses, rtol=0, atol=1e-9)
        for name, value in state.items():
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-9, err_msg=name)
        seen |= state.keys()
    assert seen == expected.keys()


def test_nothing_moves_and_nothing_is_told_twice_where_experts_cost_nothing(tmp_path: Path) -> None:
    run_workers(4, work, make_run(tmp_path / "moving", rebalance=True, experts=1e-7))
    assert not read_rebalances(tmp_path / "moving")
    decided = events(tmp_path / "moving", "rebalance")
    assert all(line["message"].startswith("experts stay: no placement is predicted") for line in decided)
    assert 1 <= len(decided) == len(events(tmp_path / "moving", "drift")) < STEPS // EVERY


@pytest.mark.parametrize(
    "plan", [one_group, *(pytest.param(p, marks=pytest.mark.long) for p in (two_groups, two_stages))]
)
def test_an_emulated_run_goes_on_with_one_clock(tmp_path: Path, plan: Callable[[float], Plan]) -> None:
    """Emulated devices are as fast as profiled, whatever this machine does; spans of all steps are kept."""
    run = make_run(tmp_path / "moving", rebalance=True, emulate=True, plan=plan)
    ranks = run_workers(run.world.size, work, run)
    assert read_rebalances(tmp_path / "moving")
    assert all(steps == list(range(STEPS)) for *_, steps in ranks)
    assert not (tmp_path / "moving/board.bin").exists()
