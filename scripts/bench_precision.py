"""Do bf16, fp16 and both mixed learn as fp32 does? Losses over 200 steps, two CPU workers, the default corpus.

Every run is `hetermoe profile`, `plan` and `train` with the same weights, text and order of text. Curves are compared
as running means over 20 steps. The bounds follow from the format, not from these runs: rounding to bf16 moves a weight
or an activation by at most 2^-8 of itself, so a curve may be off by that share of a uniform model's loss, ln 256 nats a
byte, where it is worst. Rounding to nearest has no sign, so at the end, in training and in validation, it may be off by
half of that. fp16 rounds eight times finer, but gets the same bounds: any change sends some tokens to other experts,
and from then on runs drift apart. How far is told by an fp32 run whose initial weights are all larger by 2^-8. A run
with another seed (weights and order of text) must break the bounds.

    python scripts/bench_precision.py --json > precision.json
"""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bars
from demo import ROOT, hetermoe
from hetermoe_cli.runtime.run.recorder import read_metrics
from hetermoe_cli.spec.cluster import ClusterSpec
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.named_models import load_model
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.spec.profile import Precision
from hetermoe_cli.spec.train import TrainSpec

FOLDER = ROOT / "runs" / "bench-precision"
MODEL, TRAIN, CLUSTER = (
    ROOT / "plans" / name for name in ("models/learner.yaml", "train/learner.yaml", "clusters/cpu2.yaml")
)
STEPS, SMOOTHED_STEPS, VALIDATION_BATCHES = 200, 20, 16
ROUNDING = 2.0**-8  # unit round-off of bf16
LARGEST = round(ROUNDING * math.log(256), 4)
AT_THE_END = round(LARGEST / 2, 4)
ONE, OTHER = "cpu", "cpu-fp16"  # device types of this machine's cores
WRITTEN = "Written by scripts/bench_precision.py."

Curve = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One run; `train` and `model` replace fields of the files above. `mixed`: two device types instead of one."""

    name: str
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    assignment: str = "ep"
    mixed: bool = False


@dataclass(frozen=True)
class Learned:
    """What a run left: its losses in nats a byte, and who did what."""

    losses: Curve
    validation_loss: float
    skipped_steps: int
    seconds_per_step: float
    layout: dict[str, Any]

    @property
    def smooth(self) -> Curve:
        """Running means over SMOOTHED_STEPS."""
        return np.convolve(self.losses, np.full(SMOOTHED_STEPS, 1 / SMOOTHED_STEPS), "valid")


REFERENCE = Case("fp32")
HALVES = [
    Case("bf16", {"precision": "bf16"}),
    Case("fp16", {"precision": "fp16"}),
    Case(
        "bf16 and fp16, both attend and host experts, exchange in bf16",
        {"precision": "bf16", "device_precision": {OTHER: "fp16"}},
        mixed=True,
    ),
    Case(
        "bf16 and fp16, one attends and one hosts the experts, exchange in fp16",
        {"precision": "fp16", "device_precision": {ONE: "bf16"}},
        assignment="dist_ep",
        mixed=True,
    ),
]
_WIDTH = load_model(str(MODEL)).initializer_range
ROUNDED = Case("fp32, initial weights larger by 2^-8", model={"initializer_range": _WIDTH * (1 + ROUNDING)})
OTHER_SEED = Case("fp32, another seed", {"seed": 1})


def profile(device: str, precision: Precision, length: int) -> None:
    """One of the device types in one precision; the link once."""
    sizes = ("--sequence-lengths", length, "--sequences", "1,4", "--tokens", "64,256,1024")
    what = ("--device", "cpu", "--name", device, "--model", MODEL, "--precision", precision)
    link = () if (device, precision) == (ONE, "fp32") else ("--no-network",)
    hetermoe("profile", "--quick", *what, *sizes, *link, "--output", FOLDER / "profiles")


def write_inputs(case: Case, folder: Path) -> tuple[Path, Path, Path]:
    """Model, cluster and training spec of a case."""
    model = ModelConfig.model_validate(load_model(str(MODEL)).model_dump() | case.model)
    base = load(TrainSpec, TRAIN).model_dump() | {"steps": STEPS, "learning_rate": 1e-3, "warmup_steps": STEPS // 4}
    cluster = load(ClusterSpec, CLUSTER)
    if case.mixed:
        (node,) = cluster.nodes
        types = [(ONE, "one"), (OTHER, "other")]
        parts = [{"device": device, "name": name, "devices": 1, "machine": "this"} for device, name in types]
        cluster = cluster.model_copy(update={"nodes": [node.model_copy(update=part) for part in parts]})
    files = (folder / "model.yaml", folder / "cluster.yaml", folder / "train.yaml")
    for spec, path in zip((model, cluster, TrainSpec.model_validate(base | case.train)), files, strict=True):
        dump(spec, path, WRITTEN)
    return files


def learn(case: Case, folder: Path) -> Learned:
    """Plan and train."""
    model, cluster, train = write_inputs(case, folder)
    plan, run = folder / "plan.yaml", folder / "run"
    inputs = ("--model", model, "--cluster", cluster, "--train", train, "--profiles", FOLDER / "profiles")
    hetermoe("plan", *inputs, "--assignment", case.assignment, "--output", plan)
    told = hetermoe(
        "train", plan, "--run-folder", run, "--validation-batches", VALIDATION_BATCHES, "--trace-steps", 0,
        "--drift-every", 0,
    )  # fmt: skip
    steps = [line for line in read_metrics(run) if line["event"] == "step"]
    made = load(Plan, plan)
    precisions = [made.inputs.train.precision_of(device.type) for device in made.inputs.devices()]
    return Learned(
        losses=np.array([line["loss"] for line in steps]),
        validation_loss=told["validation_loss"],
        skipped_steps=sum(line.get("skipped", False) for line in steps),
        seconds_per_step=told["measured_seconds"],
        layout={
            "precision_per_rank": precisions,
            "exchange": made.inputs.train.precision,
            "sequences_per_rank": made.layout.sequences_per_rank,
            "experts_per_rank": [len(experts) for experts in made.layout.placement[0].experts],
            "micro_batches": made.layout.schedule.micro_batches,
        },
    )


def differences(run: Learned, reference: Learned) -> dict[str, float]:
    """Nats a byte: the largest of the running means, the last of them, and the validation loss."""
    off = run.smooth - reference.smooth
    return {
        "largest": float(np.abs(off).max()),
        "at_the_end": float(off[-1]),
        "validation": run.validation_loss - reference.validation_loss,
    }


def within(found: dict[str, float]) -> bool:
    """All three bounds."""
    return found["largest"] <= LARGEST and max(abs(found["at_the_end"]), abs(found["validation"])) <= AT_THE_END


def judge(cases: Sequence[Case], found: dict[str, dict[str, float]]) -> list[bars.Bar]:
    """Bars of the halves; and that the bounds are no wider than they must be."""
    result = []
    for case in cases:
        off = found[case.name]
        label = f"{case.name}, against fp32, nats a byte"
        result += [
            bars.at_most(f"{label}: running mean of {SMOOTHED_STEPS} steps, largest", off["largest"], LARGEST),
            bars.at_most(f"{label}: last {SMOOTHED_STEPS} steps", abs(off["at_the_end"]), AT_THE_END),
            bars.at_most(f"{label}: validation at the end", abs(off["validation"]), AT_THE_END),
        ]
    return [*result, bars.is_true(f"{OTHER_SEED.name} breaks these bounds", not within(found[OTHER_SEED.name]))]


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """All runs, one after another."""
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    length = load(TrainSpec, TRAIN).sequence_length
    for precision in ("fp32", "bf16", "fp16"):
        profile(ONE, precision, length)
    profile(OTHER, "fp16", length)
    cases = [REFERENCE, *HALVES, ROUNDED, OTHER_SEED]
    runs = {case.name: learn(case, FOLDER / str(index)) for index, case in enumerate(cases)}
    reference = runs[REFERENCE.name]
    found = {name: differences(run, reference) for name, run in runs.items()}
    samples = {name: {**found[name], **vars(run), "losses": run.losses.tolist()} for name, run in runs.items()}
    return judge(HALVES, found), {"runs": samples, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    bars.report(__doc__, measure)
