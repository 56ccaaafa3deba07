"""Bars of one CUDA card: the card profiled, the engine on it against the engine on the CPU, a truly mixed run.

    python scripts/bench_gpu.py --json > gpu.json

Profiles of the card (Mixtral-D1's widths in the precision it is made for, and the model below) go to profiles/, where
they replace modelled ones. Runs train a small model in fp64 and compare losses, and in fp32 for times: on the card
alone; attention on the card with experts on the CPU through gloo; with two cards, one rank on each through NCCL.
Without a CUDA device it says so and leaves with code 77 (bars.SKIPPED).
"""

import os
import shutil
import sys
from pathlib import Path
from statistics import median
from typing import Any

import bars
from demo import ROOT, hetermoe
from emulated_plans import manual_plan
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.runtime.run.recorder import read_metrics
from hetermoe_cli.spec.cluster import ClusterSpec, Link, NodeGroup
from hetermoe_cli.spec.files import dump
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.library import collect_inputs
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.profile import Precision
from hetermoe_cli.spec.schedule_choice import ScheduleChoice
from hetermoe_cli.spec.train import TrainSpec

FOLDER, PROFILES = ROOT / "runs" / "bench-gpu", ROOT / "profiles"
STEPS, LENGTH, MICRO_BATCHES = 12, 256, 4
WARM_UP = 3
MODEL = ModelConfig(
    name="bench-gpu", layers=4, hidden_size=256, ffn_size=512, attention_heads=4, kv_heads=2, head_size=64,
    experts=8, top_k=2, vocab_size=256, initializer_range=0.02,
)  # fmt: skip
_AMPERE = 8  # major compute capability from which bf16 is not emulated


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """Profile, plan, train, compare."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as `hetermoe` counts cards
    import torch

    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    dump(MODEL, FOLDER / "model.yaml", "Written by scripts/bench_gpu.py.")
    precision: Precision = "bf16" if torch.cuda.get_device_capability(0)[0] >= _AMPERE else "fp16"
    card = _profile("cuda:0", "plans/models/demo.yaml", precision, PROFILES)["profile"]
    name = card["device"]
    for device in ("cuda:0", "cpu"):
        for kind in ("fp64", "fp32"):
            _profile(device, FOLDER / "model.yaml", kind, FOLDER / "profiles")
    kinds: tuple[Precision, ...] = ("fp64", "fp32")
    found: dict[str, Any] = {"card": card["facts"]["product"], "software": card["software"], "precision": precision}
    for kind in kinds:
        found[kind] = {
            "cpu alone": _run("cpu alone", [("cpu", 1)], [[1], [8]], kind),
            "card alone": _run("card alone", [(name, 1)], [[1], [8]], kind),
            "attention on the card": _run("attention on the card", [(name, 1), ("cpu", 1)], [[1, 0], [0, 8]], kind),
        }
        if torch.cuda.device_count() > 1:
            found[kind]["two cards"] = _run("two cards", [(name, 2)], [[1, 0], [0, 8]], kind)
    return _bars(found), found


def _profile(device: str, model: Path | str, precision: str, output: Path) -> dict[str, Any]:
    sizes = () if output == PROFILES else ("--sequence-lengths", LENGTH, "--sequences", 1, "--tokens", "16,64,128,256")
    arguments = ("--quick", "--device", device, "--model", model, "--precision", precision, "--output", output)
    return hetermoe("profile", "--no-network", *arguments, *sizes)


def _run(name: str, nodes: list[tuple[str, int]], parts: list[list[int]], precision: Precision) -> dict[str, Any]:
    """Train a layout laid out by hand: `parts` are sequences per micro-batch and hosted experts of every rank."""
    sequences, hosted = parts
    ends = [sum(hosted[: rank + 1]) for rank in range(len(hosted))]
    experts = [list(range(end - count, end)) for end, count in zip(ends, hosted, strict=True)]
    layout = Layout(
        schedule=ScheduleChoice(micro_batches=MICRO_BATCHES, window=MICRO_BATCHES, recompute="none"),
        sequences_per_rank=sequences,
        placement=[LayerPlacement(experts=experts)] * MODEL.layers,
    )
    train = TrainSpec(
        sequence_length=LENGTH,
        global_batch_sequences=sum(sequences) * MICRO_BATCHES,
        precision=precision,
        steps=STEPS,
        warmup_steps=1,
    )
    folders = [FOLDER / "profiles"]
    inputs = collect_inputs(MODEL, one_machine(nodes), train, folders)
    place = FOLDER / f"{name} {precision}".replace(" ", "-")
    plan = place.with_suffix(".yaml")
    dump(manual_plan(inputs, LayoutCost(CostModel(inputs), layout)), plan, "A layout of scripts/bench_gpu.py.")
    hetermoe("train", plan, "--run-folder", place, "--steps", STEPS)
    steps = [line for line in read_metrics(place) if line["event"] == "step"]
    timed = steps[WARM_UP:]
    return {
        "losses": [line["loss"] for line in steps],
        "seconds": median(line["iteration_seconds"] for line in timed),
        "predicted_seconds": timed[0]["predicted_iteration_seconds"],
        "count_wait_seconds": median(line.get("count_wait_seconds", 0.0) for line in timed),
    }


def one_machine(devices: list[tuple[str, int]]) -> ClusterSpec:
    """This machine, with so many devices of each type."""
    link = Link(bandwidth_gigabytes_per_second=1.0, latency_microseconds=300.0)  # of gloo; times are not judged by it
    return ClusterSpec(
        name="this-machine",
        nodes=[
            NodeGroup(name=device, machine="this", device=device, devices=count, network=link, interconnect=link)
            for device, count in devices
        ],
    )


def _bars(found: dict[str, Any]) -> list[bars.Bar]:
    """Correctness in fp64; in fp32 what a card must do better than a core, and how long it waits for numbers."""
    exact, fast = found["fp64"], found["fp32"]
    wanted = exact["cpu alone"]["losses"]
    result = []
    for name, run in exact.items():
        if name != "cpu alone":
            error = max(abs(one / other - 1) for one, other in zip(run["losses"], wanted, strict=True))
            result.append(bars.at_most(f"{name}: fp64 losses against the CPU's, largest relative error", error, 1e-8))
    core, card, mixed = (fast[name] for name in ("cpu alone", "card alone", "attention on the card"))
    result += [
        bars.at_least("fp32 step of one core over the card's", core["seconds"] / card["seconds"], 2.0),
        bars.at_most("card alone: step against predicted, relative error", _off(card), 0.25),
        bars.at_most(
            "mixed run: step over the CPU's alone, as its core has the experts only",
            mixed["seconds"] / core["seconds"],
            1.0,
        ),
    ]
    return result


def _off(run: dict[str, Any]) -> float:
    return abs(float(run["seconds"] / run["predicted_seconds"]) - 1)


if __name__ == "__main__":
    from torch import cuda

    if "--help" not in sys.argv and not cuda.is_available():
        print("bench_gpu: no CUDA device here: nothing measured", file=sys.stderr)
        sys.exit(bars.SKIPPED)
    bars.report(__doc__, measure)
