"""Training speed against DeepSpeed AutoEP and Hugging Face + DDP: two processes of one thread, one model, real text.

All train the same Mixtral from the same weights on the same bytes with the same AdamW and clipping, in fp32. They take
turns: in every round each trains the same next steps while the others wait, the first of them not timed. The engine
runs what a user would: profile, plan, a short run that records the expert load, a plan for that load, and
`hetermoe train`, which each round resumes. A rival runs its fastest variant, found first. Leave the machine alone.

    python scripts/bench_rivals.py --json > rivals.json
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import bars
from demo import ROOT, hetermoe
from hetermoe_cli.errors import UserError
from hetermoe_cli.report.bench import ratio
from hetermoe_cli.spec.files import load
from hetermoe_cli.spec.model import load_model
from hetermoe_cli.spec.train import TrainSpec
from rivals_environment import PINNED, environment
from rivals_runs import Rival, Steps, write_job

FOLDER = ROOT / "runs" / "bench-rivals"
MODEL, TRAIN = ROOT / "plans/models/rivals.yaml", ROOT / "plans/train/rivals.yaml"
CLUSTER = ROOT / "plans/clusters/cpu2.yaml"
ROUNDS, STEPS, WARM_UP = 12, 7, 2  # steps of a round, of which the first are not timed
LOAD_STEPS = 48  # in the first ones all choose the same experts
TRIALS, TRIAL_STEPS = 2, 4
COMPARED_STEPS = 4  # losses; later a near-tie in a gate may fall either way
LOSS_TOLERANCE = 2e-5  # relative, fp32
LIMITS = {"deepspeed": 0.8, "hugging_face": 0.7}
MOST_SECONDS = 600
# Not here: experts "batched_mm", which copies an expert's weights for every row (12 GB a rank at this size), and
# AutoEP's grouped GEMM, which needs Triton.
_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "deepspeed": [{"zero": 0}, {"zero": 1}, {"zero": 2}],
    "hugging_face": [{"experts": "eager", "bucket_mb": 25}, {"experts": "grouped_mm", "bucket_mb": 25}],
}
# each also as the engine's workers are started: they keep freed memory, and each has a core of its own
_STARTS = [
    {"keeps_freed": False, "bound": False},
    {"keeps_freed": True, "bound": False},
    {"keeps_freed": True, "bound": True},
]
VARIANTS = {name: [one | start for one in settings for start in _STARTS] for name, settings in _SETTINGS.items()}


def planned(folder: Path) -> Path:
    """The plan that the engine runs: for the load of the first steps."""
    profiles, first, recorded, plan = (folder / name for name in ("profiles", "first.yaml", "load", "plan.yaml"))
    length = load(TrainSpec, TRAIN).sequence_length
    hetermoe("profile", "--quick", "--model", MODEL, "--sequence-lengths", length, "--output", profiles)
    inputs = ("--model", MODEL, "--cluster", CLUSTER, "--train", TRAIN, "--profiles", profiles)
    hetermoe("plan", *inputs, "--output", first)
    hetermoe("train", first, "--run-folder", recorded, "--steps", LOAD_STEPS, "--validation-batches", 1)
    hetermoe("plan", *inputs, "--load", recorded, "--output", plan)
    return plan


def engine_steps(plan: Path, folder: Path, start: int, stop: int) -> Steps:
    """Steps start..stop of the engine's run, whose checkpoint after `start` is there if that is not 0."""
    options = ("--steps", stop, "--validation-batches", 1, "--trace-steps", 0)
    hetermoe("train", plan, "--run-folder", folder, *options, *(["--resume"] if start else []))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mine = [line for line in lines if line["event"] == "step" and start <= line["step"] < stop]
    return Steps([line["loss"] for line in mine], [line["iteration_seconds"] for line in mine])


def fastest(rival: str, python: Path, folder: Path, job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The rival's fastest variant on this machine, and the median step of each; they take turns."""
    variants = VARIANTS[rival]
    with ExitStack() as stack:
        rivals = [
            stack.enter_context(Rival(python, folder / str(number), job | {"rival": rival, "variant": variant}))
            for number, variant in enumerate(variants)
        ]
        for one in rivals:
            one.wait_ready()
        seconds: list[list[float]] = [[] for _ in rivals]
        for trial in range(TRIALS):
            for one, found in zip(rivals, seconds, strict=True):
                found += one.train(trial * TRIAL_STEPS, (trial + 1) * TRIAL_STEPS).seconds[1:]
    medians = [median(found) for found in seconds]
    best = variants[medians.index(min(medians))]
    return best, {json.dumps(variant): found for variant, found in zip(variants, medians, strict=True)}


def take_turns(plan: Path, rivals: dict[str, Rival], folder: Path) -> dict[str, list[Steps]]:
    """All rounds of all; who begins moves on by one each round."""
    found: dict[str, list[Steps]] = {name: [] for name in ("engine", *rivals)}
    names = list(found)
    for number in range(ROUNDS):
        start, stop = number * STEPS, (number + 1) * STEPS
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name == "engine":
                found[name].append(engine_steps(plan, folder / "engine", start, stop))
            else:
                found[name].append(rivals[name].train(start, stop))
        told = ", ".join(f"{name} {median(timed(rounds)[-1]):.3f}" for name, rounds in found.items())
        print(f"round {number + 1} of {ROUNDS}, seconds a step: {told}", file=sys.stderr)
    return found


def timed(rounds: Sequence[Steps]) -> list[list[float]]:
    """Seconds of the timed steps, by round."""
    return [one.seconds[WARM_UP:] for one in rounds]


def loss_difference(ours: Sequence[Steps], theirs: Sequence[Steps]) -> float:
    """Largest relative difference over the first steps."""
    pairs = zip(ours[0].losses[:COMPARED_STEPS], theirs[0].losses[:COMPARED_STEPS], strict=True)
    return max(abs(one / other - 1) for one, other in pairs)


def judge(found: dict[str, list[Steps]]) -> tuple[list[bars.Bar], dict[str, Any]]:
    """Bars, and the ratios that they were computed from."""
    ours, result, ratios = found["engine"], [], {}
    for name, limit in LIMITS.items():
        measured = ratio(timed(ours), timed(found[name]))
        ratios[name] = asdict(measured)
        result += [
            bars.at_most(f"engine over {name}: step time, median over rounds", measured.median, limit),
            bars.at_most(f"engine over {name}: step time, upper end of the 95 % interval", measured.high, limit),
            bars.at_most(
                f"engine against {name}: relative difference of the first losses",
                loss_difference(ours, found[name]),
                LOSS_TOLERANCE,
            ),
        ]
    return result, ratios


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """Install, plan, choose variants, take turns."""
    python = environment()
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    model, train = load_model(str(MODEL)), load(TrainSpec, TRAIN)
    job = write_job(FOLDER / "job", model, train, ROUNDS * STEPS)
    plan = planned(FOLDER)
    variants, trials = {}, {}
    for name in LIMITS:
        variants[name], trials[name] = fastest(name, python, FOLDER / name / "trials", job)
        print(f"{name}: {json.dumps(trials[name])}, so {json.dumps(variants[name])}", file=sys.stderr)
    with ExitStack() as stack:
        rivals = {
            name: stack.enter_context(Rival(python, FOLDER / name, job | {"rival": name, "variant": variant}))
            for name, variant in variants.items()
        }
        for rival in rivals.values():
            rival.wait_ready()
        found = take_turns(plan, rivals, FOLDER)
    result, ratios = judge(found)
    result += [
        bars.at_least("interleaved rounds", len(found["engine"]), 10),
        bars.at_most("seconds of this benchmark, without installing", time.monotonic() - began, MOST_SECONDS),
    ]
    return result, {
        "pinned": PINNED,
        "variants": variants,
        "trial_seconds": trials,
        "ratios": ratios,
        "median_seconds": {name: median(map(median, timed(rounds))) for name, rounds in found.items()},
        "rounds": {name: [asdict(one) for one in rounds] for name, rounds in found.items()},
        "model": model.model_dump(),
        "train": train.model_dump(),
    }


if __name__ == "__main__":
    try:
        bars.report(__doc__, measure)
    except UserError as error:
        print(f"bench_rivals: error: {error}", file=sys.stderr)
        sys.exit(int(error.code))
