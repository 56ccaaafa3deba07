"""Emulated training against predictions: 2 A40 + 2 V100 with Mixtral-D1's widths, real workers on this machine's CPU.

1. The plan, EP and DistEP at 4K, 16K and 32K, balanced router: speed-ups measured against predicted.
2. Held-out plans (emulated_plans.py), two of them with shifts, whose files and predictions are hashed and written down
   before anything runs.
3. The same plans with the learned router, against a simulation with the expert rows that were really sent.

All seconds are nominal: the modelled devices', which workers are stretched to (see demo.py).
"""

import hashlib
import json
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import bars
from demo import ROOT, hetermoe
from emulated_plans import CLUSTER, MODEL, TRAIN, held_out
from hetermoe_cli.spec.files import load, write_atomic
from hetermoe_cli.spec.plan import Plan

FOLDER = ROOT / "runs" / "bench-emulated"
ROUNDS = {4096: 1, 16384: 2, 32768: 1}  # by sequence length
ASSIGNMENTS = ("optimal", "ep", "dist_ep")
HELD_OUT, SEED = 10, 20261124
STEPS, WARM_UP = 3, 1
EXECUTED_LENGTH = (
    32  # four processes share few cores: few hundred expert rows a task, equal for all experts if balanced
)
LEAST_GAIN = 1.6  # over EP at 16K
MOST_SECONDS = 900


def frozen(plans: list[Path]) -> dict[str, Any]:
    """Hash and prediction of every plan file, which holds its profiles, and the hashes of those."""
    found = {}
    for path in plans:
        plan = load(Plan, path)
        found[path.stem] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "predicted_seconds": plan.predicted.iteration_seconds,
            "inputs_sha256": plan.inputs_sha256,
        }
    return found


def bench(plans: list[Path], name: str, router: str, rounds: int) -> dict[str, Any]:
    """`hetermoe bench` of some plans."""
    emulation = ("--emulate", "--executed-sequence-length", EXECUTED_LENGTH, "--router", router)
    timing = ("--repeats", rounds, "--steps", STEPS, "--warm-up", WARM_UP, "--trace-steps", 0)
    return hetermoe("bench", *plans, "--output", FOLDER / name, *emulation, *timing)


def searched(length: int) -> list[Path]:
    """The plan and its rivals at a sequence length."""
    files = []
    for assignment in ASSIGNMENTS:
        files.append(FOLDER / "plans" / f"{length // 1024}k-{assignment}.yaml")
        inputs = ("--model", MODEL, "--cluster", CLUSTER, "--train", TRAIN, "--sequence-length", length)
        hetermoe("plan", *inputs, "--assignment", assignment, "--output", files[-1])
    return files


def speed_ups(length: int, result: dict[str, Any]) -> list[bars.Bar]:
    """Over EP and DistEP, measured against predicted."""
    found = []
    for entry, rival in zip(result["entries"][1:], ("EP", "DistEP"), strict=True):
        gain, expected = entry["ratio"]["median"], entry["predicted_ratio"]
        name = f"{length // 1024}K, balanced router, emulated: speed over {rival}"
        found.append(
            bars.at_most(f"{name} against {expected:.2f}x predicted, relative error", abs(gain / expected - 1), 0.05)
        )
        if (length, rival) == (16384, "EP"):
            found.append(bars.at_least(name, gain, LEAST_GAIN))
    return found


def errors(result: dict[str, Any], key: str) -> list[float]:
    """Relative errors of the iteration time, without sign."""
    return [abs(entry[key]) for entry in result["entries"]]


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """Plan, freeze, run, compare."""
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    grid = {length: searched(length) for length in ROUNDS}
    drawn = held_out(FOLDER / "plans", HELD_OUT, SEED)
    plans = [*(path for paths in grid.values() for path in paths), *drawn]
    before = frozen(plans)
    write_atomic(FOLDER / "frozen.json", json.dumps(before, indent=2) + "\n")

    results = {
        str(length): bench(paths, f"{length // 1024}k", "balanced", ROUNDS[length]) for length, paths in grid.items()
    }
    balanced = bench(drawn, "held-out", "balanced", 1)
    learned = bench(drawn, "held-out-learned", "learned", 1)

    found = [bar for length in ROUNDS for bar in speed_ups(length, results[str(length)])]
    predicted = [before[entry["name"]]["predicted_seconds"] for entry in balanced["entries"]]
    off = [abs(e["measured_seconds"] / p - 1) for e, p in zip(balanced["entries"], predicted, strict=True)]
    everything = [*results.values(), balanced, learned]
    found += [
        bars.at_least("held-out plans", len(predicted), 10),
        bars.at_least("held-out plans: slowest over fastest prediction", max(predicted) / min(predicted), 2.0),
        bars.at_most("held-out plans, balanced router: median relative error", median(off), 0.03),
        bars.at_most("held-out plans, balanced router: worst relative error", max(off), 0.08),
        bars.at_least("held-out plans, balanced router: Kendall's tau", balanced["predicted_tau"], 0.9),
        bars.at_most(
            "held-out plans, learned router: median relative error of a replay of the recorded loads",
            median(errors(learned, "replayed_error")),
            0.05,
        ),
        bars.is_true("plans and predictions are those written down before the runs", frozen(plans) == before),
        bars.is_true("all emulated runs valid", all(e["emulation_valid"] for r in everything for e in r["entries"])),
        bars.at_most("seconds of this benchmark", time.monotonic() - began, MOST_SECONDS),
    ]
    digest = hashlib.sha256((FOLDER / "frozen.json").read_bytes()).hexdigest()
    return found, {"frozen_sha256": digest, **results, "held_out": balanced, "held_out_learned": learned}


if __name__ == "__main__":
    bars.report(__doc__, measure)
