"""The planner at scale: 64 GPUs of two types, 1,024 of four with Qwen3-235B and DeepSeek-V3; and how its time grows.

Each plan is one run of `hetermoe plan`, start to written file, in a process of its own. Planned iterations are
modelled, nothing of them is measured. Growth: seconds to find the best layout of one group of Qwen3-235B's shape (a
point of the search over groups), and to replay it.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bars
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.curves import Curves
from hetermoe_cli.planner.cluster.replayed import replay_group
from hetermoe_cli.spec.cluster import ClusterSpec, NodeGroup
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.library import collect_inputs
from hetermoe_cli.spec.named_models import load_model
from hetermoe_cli.spec.plan import Group, Plan
from hetermoe_cli.spec.train import TrainSpec

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/planner-scaling.svg"
PER_NODE = 8
LINKS = {
    "H100": ("infiniband-ndr", "nvlink-h100", 8),
    "A100-80": ("infiniband-hdr", "nvlink-a100", 8),
    "L40S": ("infiniband-hdr", "pcie4-x16", 8),
    "A40": ("infiniband-hdr", "pcie4-x16", 1),
    "T4": ("ethernet-200g", "pcie3-x16", 8),
}
BIG = ("H100", "A100-80", "L40S", "A40")
SMALL = ("L40S", "T4")
# name: (model, types, GPUs, sequences an iteration, precision, seconds of search, seconds allowed)
PLANS: dict[str, tuple[str, tuple[str, ...], int, int, str, float, float]] = {
    "64 GPUs of two types, mixtral-d1": ("mixtral-d1", SMALL, 64, 256, "fp16", 3.5, 5.0),
    "64 GPUs of two types, mixtral-w2": ("mixtral-w2", SMALL, 64, 256, "fp16", 3.5, 5.0),
    "1,024 GPUs of four types, qwen3-235b": ("qwen3-235b", BIG, 1024, 2048, "bf16", 40.0, 60.0),
    "1,024 GPUs of four types, deepseek-v3": ("deepseek-v3", BIG, 1024, 4096, "bf16", 40.0, 60.0),
}
MOST_GIBIBYTES = 4.0
BASE = {"layers": 24, "micro_batches": 8, "types": 4, "gpus": 256}
GROWTH: dict[str, tuple[int, ...]] = {
    "layers": (12, 24, 48, 94),
    "micro_batches": (2, 4, 8, 16),
    "types": (1, 2, 3, 4),
    "gpus": (64, 128, 256, 512, 1024),
}


def cluster(types: tuple[str, ...], gpus: int) -> ClusterSpec:
    """Equal numbers of every type in nodes of eight."""
    nodes = []
    for device in types:
        network, interconnect, nics = LINKS[device]
        count = gpus // len(types) // PER_NODE
        nodes.append(
            NodeGroup(
                name=device.lower(),
                count=count,
                device=device,
                devices=PER_NODE,
                nics=nics,
                network=network,
                interconnect=interconnect,
            )
        )
    return ClusterSpec(name=f"{gpus}-gpus", nodes=nodes)


def training(batch: int, precision: str) -> TrainSpec:
    """4,096 tokens a sequence; the dense part in whichever state is best where it is too large to replicate."""
    state = "auto" if precision == "bf16" else "replicated"
    return TrainSpec.model_validate(
        {"sequence_length": 4096, "global_batch_sequences": batch, "precision": precision, "dense_state": state}
    )


def run_plan(name: str) -> dict[str, Any]:
    """One `hetermoe plan`: wall seconds, peak memory of the process, and what it found."""
    model, types, gpus, batch, precision, search, _ = PLANS[name]
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        dump(cluster(types, gpus), where / "cluster.yaml")
        dump(training(batch, precision), where / "train.yaml")
        command = [
            Path(sys.executable).parent / "hetermoe", "plan", "--model", model, "--cluster", where / "cluster.yaml",
            "--train", where / "train.yaml", "--profiles", ROOT / "profiles", "--time-limit", search,
            "--output", where / "plan.yaml",
        ]  # fmt: skip
        began = time.monotonic()
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        if status:
            return {"seconds": None, "gibibytes": None, "gap": None}
        plan = load(Plan, where / "plan.yaml")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "gibibytes": usage.ru_maxrss / 2**20,
        "iteration_seconds": plan.predicted.iteration_seconds,
        "bound_seconds": plan.bound.iteration_seconds,
        "work_bound_seconds": plan.bound.work_iteration_seconds,
        "gap": plan.gap,
        "groups": [
            {"copies": len(g.replicas), "devices": len(g.replicas[0]), "sequences": g.sequences, "how": str(g.schedule)}
            for g in plan.groups
        ],
        "looked_at": {"compositions": plan.solver.candidates, "placements": plan.solver.solved},
    }


def growth() -> dict[str, list[dict[str, float]]]:
    """Seconds against each of layers, micro-batches, types and GPUs; the others as in BASE."""
    return {
        name: [{"at": value, **_point(**{**BASE, name: value})} for value in values] for name, values in GROWTH.items()
    }


def _point(layers: int, micro_batches: int, types: int, gpus: int) -> dict[str, float]:
    model = load_model("qwen3-235b").model_copy(update={"layers": layers})
    spec, share = cluster(BIG[:types], gpus), micro_batches * max(32, gpus // 4)
    folders = [ROOT / "profiles"]
    inputs = collect_inputs(model, spec, training(share, "bf16"), folders)
    began = time.monotonic()
    CostModel(inputs)
    point = Curves(inputs, micro_batches, 1).point(tuple(n.count * n.devices for n in spec.nodes), share)
    found = time.monotonic()
    if point is None:
        return {"search_seconds": found - began}
    replayed = replay_group(inputs, Group.of(point.found.layout(), [list(range(spec.world_size))]))
    return {
        "search_seconds": found - began,
        "replay_seconds": time.monotonic() - found,
        "modelled_seconds": replayed.computed,
    }


def draw(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Log-log curves of `growth`, a panel for each size."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(14, 3.2), sharey=True, layout="constrained")
    for panel, (name, points) in zip(panels, found.items(), strict=True):
        for key, label in (("search_seconds", "find the best layout"), ("replay_seconds", "replay it")):
            known = [(point["at"], point[key]) for point in points if key in point]
            panel.plot(*zip(*known, strict=True), marker="o", label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks([point["at"] for point in points], [str(point["at"]) for point in points])
        panel.set_xlabel(name.replace("_", "-"))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds")
    panels[0].legend()
    others = ", ".join(f"{value} {name.replace('_', '-')}" for name, value in BASE.items())
    figure.suptitle(f"One group of Qwen3-235B's shape; where not varied: {others}")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "planner"}):
        figure.savefig(path, metadata={"Date": None})


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """All plans, then growth."""
    found, samples = [], {}
    for name, (*_, allowed) in PLANS.items():
        sample = samples[name] = run_plan(name)
        found.append(bars.at_most(f"{name}: seconds of the whole command", sample["seconds"], allowed))
        found.append(bars.at_most(f"{name}: peak GiB", sample["gibibytes"], MOST_GIBIBYTES))
        found.append(bars.is_true(f"{name}: gap stated", None if sample["gap"] is None else sample["gap"] < 1))
    return found, {"plans": samples, "growth": growth()}


def measure_and_draw() -> tuple[list[bars.Bar], dict[str, Any]]:
    """The same, and the picture of the growth."""
    found, samples = measure()
    draw(samples["growth"], PICTURE)
    return found, samples


if __name__ == "__main__":
    bars.report(__doc__, measure_and_draw)
