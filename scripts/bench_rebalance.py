"""What moving experts in mid-run gains, emulated: the same training with and without `--rebalance`, step against step.

2 A40 + 2 V100 and the demo's model (plans/*/demo.yaml) under expert parallelism, whose old devices host as many experts
as new ones. Wide initial weights and a low learning rate make the router's load uneven and steady. Both runs start from
the same weights and route alike: steps after the first move differ in placement only.
"""

import json
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import bars
from demo import EXECUTED_SEQUENCE_LENGTH, MICRO_BATCHES, ROOT, hetermoe
from hetermoe_cli.launch.prepare import small_model
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.named_models import load_model
from hetermoe_cli.spec.train import TrainSpec

FOLDER = ROOT / "runs" / "bench-rebalance"
STEPS, EVERY = 16, 4
LEARNING_RATE, INITIALIZER_RANGE, SEED = 1e-5, 0.2, 1
LEAST_GAIN = 1.05
MOST_ERROR = 0.08


def plan() -> Path:
    """The plan file; beside it the model that is really trained."""
    files = {kind: ROOT / "plans" / kind / "demo.yaml" for kind in ("models", "clusters")}
    spec = load(TrainSpec, ROOT / "plans" / "train" / "demo.yaml")
    dump(spec.model_copy(update={"learning_rate": LEARNING_RATE, "seed": SEED}), FOLDER / "train.yaml")
    small = small_model(load_model(str(files["models"])))
    dump(small.model_copy(update={"initializer_range": INITIALIZER_RANGE}), FOLDER / "executed.yaml")
    output = FOLDER / "ep.yaml"
    inputs = ("--model", files["models"], "--cluster", files["clusters"], "--train", FOLDER / "train.yaml")
    limit = ("--max-micro-batches", MICRO_BATCHES)
    hetermoe("plan", *inputs, *limit, "--assignment", "ep", "--output", output)
    return output


def train(plan_file: Path, name: str, *options: object) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    run = ("--run-folder", FOLDER / name, "--steps", STEPS, "--drift-every", EVERY, "--trace-steps", 0)
    length = ("--executed-sequence-length", EXECUTED_SEQUENCE_LENGTH)
    emulation = ("--emulate", "--executed", FOLDER / "executed.yaml", *length)
    figures = hetermoe("train", plan_file, *run, *emulation, *options)
    lines = [json.loads(line) for line in (FOLDER / name / "metrics.jsonl").read_text().splitlines()]
    return [*lines, {"event": "figures", **figures}]


def compare() -> dict[str, Any]:
    """Nominal seconds of every step in both runs, the moves, and their gain over the steps after the first one."""
    plan_file = plan()
    still, moving = train(plan_file, "still"), train(plan_file, "moving", "--rebalance")
    scale = moving[-1]["time_scale"]
    seconds = [
        [line["iteration_seconds"] / scale for line in lines if line["event"] == "step"] for lines in (still, moving)
    ]
    moves = moving[-1]["moves"]
    first = min((move["step"] for move in moves), default=STEPS)
    pairs = list(zip(*seconds, strict=True))[first:]
    return {
        "still_seconds": seconds[0],
        "moving_seconds": seconds[1],
        "moves": moves,
        "decisions": [line for line in moving if line["event"] == "rebalance"],
        "gain": median(before / after for before, after in pairs) if pairs else None,
        "replayed_error": moving[-1]["measured_seconds"] / moving[-1]["replayed_seconds"] - 1,
        "valid": all(lines[-1]["emulation_valid"] for lines in (still, moving)),
    }


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """Both runs."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    result = compare()
    found = [
        bars.at_least("moves", float(len(result["moves"])), 1),
        bars.at_least("iteration without over with moves, emulated", result["gain"], LEAST_GAIN),
        bars.at_most(
            "iteration after the last move against a replay of its loads, relative error",
            abs(result["replayed_error"]),
            MOST_ERROR,
        ),
        bars.is_true("all emulated runs valid", result["valid"]),
    ]
    return found, result


if __name__ == "__main__":
    bars.report(__doc__, measure)
