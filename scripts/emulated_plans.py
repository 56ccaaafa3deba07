"""Held-out plans of bench_emulated.py: layouts drawn at random, which no search would choose, with their predictions.

2 A40 + 2 V100 and Mixtral-D1's widths (plans/*/demo.yaml). Drawn: sequence length, R, window, recomputation, order of
experts, who attends to how many sequences, and who hosts which number of experts in every layer. In every fifth plan a
V100 takes over a micro-batch from an A40, and in every fifth all devices have shares of the head.
"""

import datetime
from pathlib import Path
from typing import get_args

import numpy as np

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.launch.prepare import automatic_time_scale
from hetermoe_cli.planner.instance.deal import number
from hetermoe_cli.planner.plan import embed
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.cluster import ClusterSpec
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.library import collect_inputs
from hetermoe_cli.spec.named_models import load_model
from hetermoe_cli.spec.plan import Bound, Group, Plan, Prediction, SolverReport
from hetermoe_cli.spec.schedule_choice import ExpertOrder, ScheduleChoice
from hetermoe_cli.spec.train import Recompute, TrainSpec

ROOT = Path(__file__).resolve().parent.parent
MODEL, CLUSTER, TRAIN = (ROOT / "plans" / kind / "demo.yaml" for kind in ("models", "clusters", "train"))
LENGTHS = (4096, 8192, 12288, 16384, 24576, 32768)
MOST_DRAWS = 2000
LONGEST_SECONDS = 5.0  # of an emulated iteration, so that the bench ends in time
WINDOWS = {"zebra": (1, (2, 4, 8)), "windowed": (2, (4, 8)), "sequential": (0, (2, 4, 8))}  # windows (0: R), R


def inputs_for(sequence_length: int) -> Inputs:
    """The emulated cluster, model and batch, with the shipped profiles."""
    folders = [ROOT / "profiles"]
    cluster = load(ClusterSpec, CLUSTER)
    return collect_inputs(
        load_model(str(MODEL)),
        cluster,
        load(TrainSpec, TRAIN).model_copy(update={"sequence_length": sequence_length}),
        folders,
    )


def held_out(folder: Path, count: int, seed: int) -> list[Path]:
    """Files of `count` plans that fit and whose emulated iteration is short; schedules in turn, half of them at 16K."""
    random = np.random.default_rng(seed)
    files: list[Path] = []
    for _ in range(MOST_DRAWS):
        if len(files) == count:
            return files
        kind = list(WINDOWS)[len(files) % len(WINDOWS)]
        inputs = inputs_for(16384 if len(files) % 2 else int(random.choice(LENGTHS)))
        drawn, turn = _draw(inputs, kind, random), len(files) % 5
        if turn > 2:
            drawn = (_in_shifts if turn == 4 else _with_head)(drawn, random)
        cost = LayoutCost(CostModel(inputs), drawn)
        if overflow(cost):
            continue
        plan = manual_plan(inputs, cost)
        if plan.predicted.iteration_seconds * automatic_time_scale(plan) <= LONGEST_SECONDS:
            files.append(folder / f"held-out-{len(files) + 1}.yaml")
            dump(plan, files[-1], "A layout drawn at random by scripts/emulated_plans.py; its prediction is simulated.")
    raise RuntimeError(f"{MOST_DRAWS} draws gave {len(files)} plans that fit and are short enough, {count} are wanted")


def _draw(inputs: Inputs, kind: str, random: np.random.Generator) -> Layout:
    """A layout of a kind of schedule: who attends is drawn once, who hosts in every layer."""
    parts, counts = WINDOWS[kind]
    micro_batches = int(random.choice(counts))
    schedule = ScheduleChoice(
        micro_batches=micro_batches,
        window=micro_batches // parts if parts else 1,
        experts=random.choice(get_args(ExpertOrder)),
        recompute=random.choice(get_args(Recompute)),
    )
    share = inputs.train.global_batch_sequences // micro_batches
    attending = [0.5, 0.5, 0, 0] if random.random() < 0.5 else [0.35, 0.35, 0.15, 0.15]
    return Layout(
        schedule=schedule,
        sequences_per_rank=random.multinomial(share, attending).tolist(),
        placement=[number(_hosting(inputs, random), 0) for _ in range(inputs.model.layers)],
    )


def _in_shifts(layout: Layout, random: np.random.Generator) -> Layout:
    """The same work, attended to by the two A40, but for a micro-batch in which a V100 takes the place of one."""
    relieved, helper = int(random.integers(0, 2)), int(random.integers(2, 4))
    taken, every = int(random.integers(0, layout.micro_batches)), list(range(layout.micro_batches))
    share = sum(layout.sequences_per_rank) // 2
    shifts = {relieved: [j for j in every if j != taken], 1 - relieved: every, helper: [taken]}
    return Layout(
        schedule=layout.schedule,
        sequences_per_rank=[share * (rank in shifts) for rank in range(4)],
        placement=layout.placement,
        shifts=[shifts.get(rank, []) for rank in range(4)],
    )


def _with_head(layout: Layout, random: np.random.Generator) -> Layout:
    """The same work, but for norm, head and loss, of which every device has a share of its own."""
    shares: list[int] = (1 + random.multinomial(60, [0.25] * 4)).tolist()
    return Layout(**dict(layout) | {"head": shares})


def _hosting(inputs: Inputs, random: np.random.Generator) -> list[int]:
    """Experts of a layer on every rank: two ranks or more host two or more each, so that no task is short."""
    world = inputs.cluster.world_size
    hosts = random.choice(world, random.integers(2, world + 1), replace=False)
    counts = np.zeros(world, int)
    counts[hosts] = 2 + random.multinomial(inputs.model.experts - 2 * len(hosts), np.full(len(hosts), 1 / len(hosts)))
    found: list[int] = counts.tolist()
    return found


def manual_plan(inputs: Inputs, cost: LayoutCost) -> Plan:
    """A plan of a given layout: predicted, not searched for."""
    layout, embedded, trace = cost.layout, embed(inputs), simulate(cost)
    ranks = range(layout.world_size)
    return Plan(
        date=datetime.date.today(),
        assignment="manual",
        groups=[Group.of(layout, [list(ranks)])],
        predicted=Prediction.of(inputs.train, trace.seconds, trace.busy_share(layout.world_size), trace.seconds),
        bound=Bound(iteration_seconds=0.0, work_iteration_seconds=0.0, exact_over="not solved"),
        gap=0.0,
        memory=[cost.memory(rank) for rank in ranks],
        baselines={},
        solver=SolverReport(name="none", status="not searched", seconds=0.0),
        inputs=embedded,
        inputs_sha256=embedded.hashes(),
    )
