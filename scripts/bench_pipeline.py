"""Pipeline stages where links between nodes are slow, against the best plan without them and against EP.

Two A40 in one node and two V100 in another, one 25 Gb/s NIC each. All seconds are EMULATED: real processes that
exchange real rows and really train a small model, stretched to modelled cards and links.
"""

import shutil
from typing import Any

import bars
from demo import ROOT, hetermoe

FOLDER = ROOT / "runs" / "bench-pipeline"
PLANS = {"stages": (), "without": ("--no-pipeline",), "ep": ("--assignment", "ep"), "pp": ("--assignment", "pp")}
STEPS, EXECUTED_SEQUENCE_LENGTH = 6, 96


def run(name: str, options: tuple[str, ...]) -> dict[str, Any]:
    """Plan and train; nominal seconds of an iteration, measured and predicted."""
    output = FOLDER / f"{name}.yaml"
    inputs = ("--model", "plans/models/deep.yaml", "--cluster", "plans/clusters/slow-links.yaml")
    spec = ("--train", "plans/train/paper-4k.yaml", "--global-batch", 32, "--output", output)
    plan = hetermoe("plan", *inputs, *spec, *options)
    emulation = ("--emulate", "--executed-sequence-length", EXECUTED_SEQUENCE_LENGTH, "--router", "balanced")
    found = hetermoe("train", output, "--run-folder", FOLDER / name, "--steps", STEPS, *emulation)
    nominal = {key: found[f"{key}_seconds"] / found["time_scale"] for key in ("measured", "predicted")}
    stages = max(len(group.get("pipeline", [])) for group in plan["groups"])
    return nominal | {"valid": found["emulation_valid"], "stages": stages}


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """All plans, one after another."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    result = {name: run(name, options) for name, options in PLANS.items()}
    stages = result["stages"]["measured"]
    found = [
        bars.at_most(
            f"{name}: iteration against predicted, relative error", abs(r["measured"] / r["predicted"] - 1), 0.02
        )
        for name, r in result.items()
    ]
    found += [
        bars.is_true("the best plan has pipeline stages", result["stages"]["stages"] > 1),
        bars.at_least(
            "speed over the best plan without stages, emulated", result["without"]["measured"] / stages, 1.05
        ),
        bars.at_least("speed over EP, emulated", result["ep"]["measured"] / stages, 1.3),
        bars.at_least("speed over the tuned pipeline as it is, emulated", result["pp"]["measured"] / stages, 0.99),
        bars.is_true("all emulated runs valid", all(r["valid"] for r in result.values())),
    ]
    return found, result


if __name__ == "__main__":
    bars.report(__doc__, measure)
