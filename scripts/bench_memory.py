"""Predicted peak of memory per rank against measured: real training on this machine's CPU, shapes of 500 MB and more.

Each shape is profiled (what autograd keeps), laid out by hand and trained for a few steps. Measured is the resident
size of the process at its peak in a step, less its size before the model was built; predicted is the plan's memory
less what it allows for the framework.

By default glibc keeps freed blocks and cuts them up, so that a process holds more than its tensors (the sample
`malloc_default`, not predicted). The bars are measured with blocks above 128 KB given back at once, which is slower.

    python scripts/bench_memory.py --json > memory.json
"""

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bars
from demo import ROOT, hetermoe
from emulated_plans import manual_plan
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.spec.cluster import ClusterSpec
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.library import collect_inputs
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.profile import Precision
from hetermoe_cli.spec.schedule_choice import ScheduleChoice
from hetermoe_cli.spec.train import TrainSpec

FOLDER = ROOT / "runs" / "bench-memory"
LEAST_BYTES, MOST_ERROR = 500e6, 0.10
STEPS = 3
COMPACT = {  # a resident size that is what is alive
    "MALLOC_MMAP_THRESHOLD_": str(128 * 1024),  # fixed, glibc does not raise it with use
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",  # huge pages round tensors up
}


@dataclass(frozen=True)
class Shape:
    """A model, a batch and who holds what on two ranks: experts of a layer `hosted` by each, the rest replicated."""

    name: str
    model: dict[str, int]
    length: int
    sequences: list[int]
    hosted: list[int]
    schedule: dict[str, Any] = field(default_factory=dict)
    precision: Precision = "fp32"
    micro_batches: int = 2
    head: list[int] = field(default_factory=list)

    @property
    def config(self) -> ModelConfig:
        """The model; fields that are not given are those of a small one."""
        small = {"attention_heads": 4, "kv_heads": 2, "experts": 8, "top_k": 2, "vocab_size": 256}
        fields = {**small, **self.model}
        head = fields["hidden_size"] // fields["attention_heads"]
        return ModelConfig(name=self.name, head_size=head, initializer_range=0.02, **fields)

    @property
    def layout(self) -> Layout:
        """Experts by number: those of rank 0, those of rank 1, the replicated ones."""
        first, both, experts = self.hosted[0], sum(self.hosted), self.config.experts
        placement = LayerPlacement(
            experts=[list(range(first)), list(range(first, both))], replicated=list(range(both, experts))
        )
        return Layout(
            schedule=ScheduleChoice(
                **{"window": self.micro_batches, "recompute": "none", **self.schedule}, micro_batches=self.micro_batches
            ),
            sequences_per_rank=self.sequences,
            placement=[placement] * self.config.layers,
            head=self.head,
        )

    @property
    def train(self) -> TrainSpec:
        """As short as it gets."""
        batch = sum(self.sequences) * self.micro_batches
        return TrainSpec(
            sequence_length=self.length, global_batch_sequences=batch, precision=self.precision, steps=STEPS,
            warmup_steps=1,
        )  # fmt: skip


SHAPES = [
    Shape(
        "attention",
        {"layers": 7, "hidden_size": 256, "ffn_size": 512},
        length=1024,
        sequences=[2, 0],
        hosted=[0, 8],
        micro_batches=4,
    ),
    Shape("weights", {"layers": 4, "hidden_size": 512, "ffn_size": 1024}, length=128, sequences=[2, 2], hosted=[4, 4]),
    Shape(
        "long-recomputed",
        {"layers": 6, "hidden_size": 256, "ffn_size": 768},
        length=2048,
        sequences=[1, 1],
        hosted=[4, 4],
        schedule={"recompute": "all"},
        micro_batches=4,
    ),
    Shape(
        "sent-again",
        {"layers": 6, "hidden_size": 384, "ffn_size": 512, "top_k": 4},
        length=1024,
        sequences=[1, 1],
        hosted=[4, 4],
        schedule={"recompute": "full"},
        micro_batches=4,
    ),
    Shape(
        "windows",
        {"layers": 6, "hidden_size": 384, "ffn_size": 512},
        length=512,
        sequences=[1, 1],
        hosted=[3, 3],
        schedule={"window": 2},
        micro_batches=4,
    ),
    Shape(
        "woven",
        {"layers": 6, "hidden_size": 384, "ffn_size": 512},
        length=1024,
        sequences=[1, 1],
        hosted=[3, 3],
        schedule={"window": 1, "passes": "woven"},
        micro_batches=4,
    ),
    Shape(
        "masters",
        {"layers": 6, "hidden_size": 512, "ffn_size": 768},
        length=256,
        sequences=[1, 1],
        hosted=[3, 3],
        schedule={"recompute": "experts"},
        precision="bf16",
    ),
    Shape(
        "dense-first",
        {"layers": 2, "hidden_size": 512, "ffn_size": 768, "dense_layers": 4, "dense_ffn_size": 3072},
        length=128,
        sequences=[1, 1],
        hosted=[3, 3],
        precision="bf16",
    ),
    Shape(
        "sharded",
        {
            "layers": 8,
            "hidden_size": 1024,
            "ffn_size": 256,
            "attention_heads": 8,
            "kv_heads": 8,
            "experts": 2,
            "top_k": 1,
        },
        length=128,
        sequences=[1, 1],
        hosted=[1, 1],
        schedule={"dense_state": "full"},
    ),
    Shape(
        "head-apart",
        {"layers": 4, "hidden_size": 512, "ffn_size": 768, "vocab_size": 16384},
        length=512,
        sequences=[2, 0],
        hosted=[0, 8],
        head=[1, 3],
        micro_batches=4,
    ),
    Shape(
        "copies",
        {"layers": 6, "hidden_size": 512, "ffn_size": 768},
        length=256,
        sequences=[1, 1],
        hosted=[1, 1],
        schedule={"dense_state": "optimizer"},
        precision="bf16",
    ),
]


def plan(shape: Shape, folder: Path) -> Path:
    """Profile what the shape needs, and write the plan of its layout."""
    folder.mkdir(parents=True)
    model_file, plan_file = folder / "model.yaml", folder / "plan.yaml"
    dump(shape.config, model_file, "Written by scripts/bench_memory.py.")
    rows = sum(shape.sequences) * shape.length * shape.config.top_k // shape.config.experts
    own = {count * shape.length * shape.config.top_k // shape.config.experts for count in shape.sequences if count}
    tokens = {rows, *own, *(count * shape.length for count in shape.sequences if count)}
    hetermoe(
        "profile", "--quick", "--device", "cpu", "--model", model_file, "--precision", shape.precision,
        "--sequence-lengths", shape.length, "--sequences", ",".join(map(str, {n for n in shape.sequences if n})),
        "--tokens", ",".join(map(str, sorted(tokens))), "--output", folder / "profiles",
    )  # fmt: skip
    cluster = load(ClusterSpec, ROOT / "plans/clusters/cpu2.yaml")
    folders = [folder / "profiles"]
    inputs = collect_inputs(shape.config, cluster, shape.train, folders)
    dump(manual_plan(inputs, LayoutCost(CostModel(inputs), shape.layout)), plan_file, "By scripts/bench_memory.py.")
    return plan_file


def train(plan_file: Path, name: str) -> dict[str, Any]:
    """What `hetermoe train` says of every rank's memory."""
    found: dict[str, Any] = hetermoe(
        "train", plan_file, "--run-folder", plan_file.parent / name, "--router", "balanced", "--trace-steps", 0
    )["memory"]
    return found


def checks(name: str, memory: dict[str, Any]) -> list[bars.Bar]:
    """Both ranks of a shape."""
    found = []
    for rank, (predicted, measured) in enumerate(zip(memory["predicted_bytes"], memory["measured_bytes"], strict=True)):
        label = f"{name}, rank {rank}: {predicted / 1e6:.0f} MB predicted"
        found.append(bars.at_least(f"{label}; measured MB", measured / 1e6, LEAST_BYTES / 1e6))
        found.append(bars.at_most(f"{label}, relative error", abs(predicted / measured - 1), MOST_ERROR))
    return found


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """All shapes."""
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    plans = {shape.name: plan(shape, FOLDER / shape.name) for shape in SHAPES}
    usual = train(plans[SHAPES[0].name], "run-malloc-default")
    os.environ |= COMPACT  # which workers inherit
    results = {name: train(path, "run") for name, path in plans.items()}
    found = [bar for name, memory in results.items() for bar in checks(name, memory)]
    return found, {**results, "malloc_default": {SHAPES[0].name: usual}, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    bars.report(__doc__, measure)
