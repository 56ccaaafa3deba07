"""Pipeline stages where links between nodes are slow, against the best plan without them and against rivals.

Two A40 in one node and two V100 in another, one 25 Gb/s NIC each; a model whose stages every device of them holds
whole, and one with too many experts for that, whose stages have all-to-alls to overlap. All seconds are EMULATED: real
processes that exchange real rows and really train a small model, stretched to modelled cards and links.
"""

import shutil
from typing import Any

import bars
from demo import ROOT, hetermoe

FOLDER = ROOT / "runs" / "bench-pipeline"
PLANS = {
    "stages": (),
    "without stages": ("--no-pipeline",),
    "EP": ("--assignment", "ep"),
    "pipeline": ("--assignment", "pp"),
}
SEARCH_SECONDS = 12
SETUPS = {  # training spec, and options of an emulated run: 128 experts need time for what is really computed
    "deep": ("paper-4k", ("--steps", 6, "--executed-sequence-length", 96)),
    "many-experts": ("sharded-4k", ("--steps", 7, "--time-scale", 4)),
}
# How much faster the plan with stages must be. With many experts EP does not fit, and what does without stages is left
# out, as it would take ten minutes: 1.5 times as long by its plan.
FASTER = {
    "deep": {"without stages": 1.05, "EP": 1.3, "pipeline": 0.99},
    "many-experts": {"pipeline": 1.1},
}


def run(model: str, name: str) -> dict[str, Any]:
    """Plan and train; nominal seconds of an iteration, measured and predicted."""
    train, emulated = SETUPS[model]
    folder = FOLDER / model / name.replace(" ", "-")
    output = folder.with_suffix(".yaml")
    inputs = ("--model", f"plans/models/{model}.yaml", "--cluster", "plans/clusters/slow-links.yaml")
    spec = ("--train", f"plans/train/{train}.yaml", "--global-batch", 32, "--output", output)
    plan = hetermoe("plan", *inputs, *spec, "--time-limit", SEARCH_SECONDS, *PLANS[name])
    found = hetermoe("train", output, "--run-folder", folder, "--emulate", "--router", "balanced", *emulated)
    nominal = {key: found[f"{key}_seconds"] / found["time_scale"] for key in ("measured", "predicted")}
    groups = plan["groups"]
    return nominal | {
        "valid": found["emulation_valid"],
        "stages": max(len(group.get("pipeline", [])) for group in groups),
        "schedules": [group["schedule"] for group in groups],
    }


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """All plans, one after another."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    result = {model: {name: run(model, name) for name in ("stages", *faster)} for model, faster in FASTER.items()}
    found = [bar for model, runs in result.items() for bar in judged(model, runs)]
    return found, result


def judged(model: str, runs: dict[str, dict[str, Any]]) -> list[bars.Bar]:
    """The bars of one model."""
    found = [
        bars.at_most(f"{model}, {name}: measured against predicted", abs(run["measured"] / run["predicted"] - 1), 0.02)
        for name, run in runs.items()
    ]
    found += [
        bars.at_least(f"{model}: speed over {name}, emulated", runs[name]["measured"] / runs["stages"]["measured"], bar)
        for name, bar in FASTER[model].items()
    ]
    return [
        *found,
        bars.is_true(f"{model}: the best plan has pipeline stages", runs["stages"]["stages"] > 1),
        bars.is_true(f"{model}: all emulated runs valid", all(run["valid"] for run in runs.values())),
    ]


if __name__ == "__main__":
    bars.report(__doc__, measure)
