"""Simulator at full size: DeepSeek-V3 (58 MoE layers of 256 experts after 3 dense ones) on 1,024 GPUs of four types,
R = 8; modelled profiles.

Layouts are made by hand: neither planned nor checked for memory. An action is a compute task of a rank, or a transfer.
`prepare` numbers the tasks and orders them by what they wait for; `event loop` computes when each starts and ends.
"""

import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from typing import Any

import numpy as np

import bars
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.load import Load, RecordedLoad
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.dataflow import dataflow
from hetermoe_cli.planner.instance.deal import number, rotate
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.schedule.zebra import part_of, training_order, windows_of
from hetermoe_cli.simulator import SimulatedTrace, compute_seconds, replay
from hetermoe_cli.spec.cluster import ClusterSpec, NodeGroup
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.library import collect_inputs, default_folders
from hetermoe_cli.spec.named_models import load_model
from hetermoe_cli.spec.schedule_choice import ScheduleChoice
from hetermoe_cli.spec.train import TrainSpec

MICRO_BATCHES = 8
TYPES = ("H100", "A100-80", "L40S", "V100")
RANKS_PER_TYPE, RANKS_PER_NODE = 256, 8
WORLD = RANKS_PER_TYPE * len(TYPES)
SEQUENCE_LENGTH = 4096
CASES = {
    "512 attend, 512 host": ("split", False),
    "512 attend, 512 host, uneven load": ("split", True),
    "all attend and host": ("all", False),
}


def inputs(sequences: int) -> Inputs:
    """128 nodes of 8 GPUs behind one Ethernet NIC each."""
    nodes = [
        NodeGroup(
            name=name.lower(),
            count=RANKS_PER_TYPE // RANKS_PER_NODE,
            device=name,
            devices=RANKS_PER_NODE,
            network="ethernet-200g",
            interconnect="pcie4-x16",
        )
        for name in TYPES
    ]
    cluster = ClusterSpec(name="four-types", nodes=nodes)
    train = TrainSpec(sequence_length=SEQUENCE_LENGTH, global_batch_sequences=sequences * MICRO_BATCHES)
    return collect_inputs(load_model("deepseek-v3"), cluster, train, default_folders())


def placements(layers: int, experts: int, types: list[int]) -> list[LayerPlacement]:
    """Experts dealt over the ranks of the hosting `types`, as many plans do: shares and hosts change with the layer."""
    totals = []
    for layer in range(layers):
        share = [experts // len(types)] * len(types)
        share[0] += 1 + layer % 7
        share[-1] -= 1 + layer % 7
        totals.append(share)
    dealt = [rotate([total[place] for total in totals], RANKS_PER_TYPE) for place in range(len(types))]
    result = []
    for layer in range(layers):
        counts = [0] * WORLD
        for place, kind in enumerate(types):
            counts[kind * RANKS_PER_TYPE : (kind + 1) * RANKS_PER_TYPE] = dealt[place][layer]
        result.append(number(counts, 0))
    return result


def layout_of(shape: str, layers: int, experts: int) -> Layout:
    """The faster two types attend and the others host, or all do both."""
    everyone = shape == "all"
    return Layout(
        schedule=ScheduleChoice(micro_batches=MICRO_BATCHES, window=MICRO_BATCHES, dense_state="full"),
        sequences_per_rank=[1] * WORLD if everyone else [2] * (WORLD // 2) + [0] * (WORLD // 2),
        placement=placements(layers, experts, [0, 1, 2, 3] if everyone else [2, 3]),
    )


def uneven(cost: CostModel, layout: Layout) -> Load:
    """Counts that differ with rank, layer, micro-batch and expert."""
    size = (layout.world_size, layout.layers, layout.micro_batches, layout.experts)
    counts = np.random.default_rng(0).poisson(20, size).astype(np.int32)
    counts[np.array(layout.sequences_per_rank) == 0] = 0
    return RecordedLoad(counts, cost.rows_per_expert(2) / 20)


class Phases(dict[str, float]):
    """Seconds of named phases."""

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        self[name] = time.perf_counter() - began
        return result


def run(shape: str, loaded: bool) -> dict[str, Any]:
    """One iteration, on one core of a fresh process."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    given = inputs(WORLD)
    layout = layout_of(shape, given.model.layers, given.model.experts)
    model = CostModel(given)
    load = uneven(model, layout) if loaded else None
    phases = Phases()
    windows = windows_of(layout)
    phases.time("generate", lambda: [training_order(part_of(layout, rank), windows) for rank in range(WORLD)])
    schedule = phases.time("lower", lambda: training_schedule(layout))
    cost = LayoutCost(model, layout, load)
    transfers = phases.time("cost of transfers", lambda: [cost.transfer(action) for action in schedule.transfers])
    flow = phases.time("prepare", lambda: dataflow(schedule, layout.layers, [found.ports for found in transfers]))
    compute = phases.time("cost of compute", lambda: compute_seconds(flow, cost))
    times = phases.time("event loop", lambda: replay(flow, compute, [found.seconds for found in transfers]))
    trace = SimulatedTrace(schedule, flow, times)
    phases.time("iteration seconds and busy shares", lambda: (trace.seconds, trace.busy_share(WORLD)))
    phases.time("spans", lambda: trace.spans)
    actions = sum(map(len, schedule.compute)) + len(schedule.transfers)
    return {
        "actions": actions,
        "different_orders": len(set(map(id, schedule.compute))),
        "simulated_iteration_seconds": trace.seconds,
        "phase_seconds": dict(phases),
        "end_to_end_seconds": sum(phases.values()),
        "event_loop_actions_per_second": actions / phases["event loop"],
        "end_to_end_actions_per_second": actions / sum(phases.values()),
        "peak_rss_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """Every case in a process of its own, so that no cache is warm and peak memory is its own."""
    found: list[bars.Bar] = []
    samples: dict[str, Any] = {"date": date.today().isoformat()}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name, case in CASES.items():
            result = samples[name] = pool.submit(run, *case).result()
            found += [
                bars.at_most(f"{name}: end to end, seconds", result["end_to_end_seconds"], 30),
                bars.at_least(f"{name}: event loop, actions/s", result["event_loop_actions_per_second"], 300_000),
            ]
    return found, samples


if __name__ == "__main__":
    bars.report(__doc__, measure)
