"""Training speed against DeepSpeed AutoEP and Hugging Face + DDP: two processes of one thread, one model, real text.

All train the same Mixtral from the same weights on the same bytes with the same AdamW and clipping, in fp32, and in
bf16 with fp32 masters. They take turns: in every round each trains the same next steps in either precision while the
others wait, the first of them not timed. The engine runs what a user would: profile, plan, a short run that records the
expert load, a plan for that load, and `hetermoe train`, which each round resumes. A rival runs its fastest setting,
found first, in processes like the engine's (rivals_runs.py). They are compared in fp32, and each in the precision in
which it is faster. Beside them, in every round, what is left of a step if nothing but torch's heavy kernels remains
(rivals_kernels.py). Leave the machine alone.

    python scripts/bench_rivals.py --json > rivals.json
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

import bars
from demo import ROOT, hetermoe
from hetermoe_cli.errors import UserError
from hetermoe_cli.report.bench import ratio
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.named_models import load_model
from hetermoe_cli.spec.profile import Precision
from hetermoe_cli.spec.train import TrainSpec
from rivals_environment import PINNED, environment
from rivals_kernels import Kernels
from rivals_runs import WORLD_SIZE, Rival, Steps, write_job

Entrant = tuple[str, str]  # who, in which precision
Found = dict[Entrant, list[Steps]]  # by round
ENGINE, KERNELS = "engine", "kernels"
FOLDER = ROOT / "runs" / "bench-rivals"
MODEL, TRAIN = ROOT / "plans/models/rivals.yaml", ROOT / "plans/train/rivals.yaml"
CLUSTER = ROOT / "plans/clusters/cpu2.yaml"
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
# Steps of a round, of which the first are not timed: rivals go on, the engine's processes are new in every round, and
# compile kernels for bf16.
ROUNDS, STEPS, WARM_UP = 10, 9, 4
LOAD_STEPS = 48  # in the first ones all choose the same experts
TRIALS, TRIAL_STEPS, TRIAL_WARM_UP = 3, 6, 2
COMPARED_STEPS = 4  # losses; later a near-tie in a gate may fall either way
LOSS_TOLERANCE = {"fp32": 2e-5, "bf16": 2**-8}  # relative
LIMITS = {"deepspeed": 0.8, "hugging_face": 0.7}
MOST_SECONDS = 600
# Not here: experts "batched_mm", which copies an expert's weights for every row (12 GB a rank at this size); AutoEP's
# grouped GEMM, which needs Triton; its bf16 without ZeRO, whose losses are 2 % off, as it keeps no masters; bf16
# weights under DDP, which keeps none either (under autocast transformers' grouped_mm computes in fp32); DDP's
# compression of gradients to bf16, which it refuses over gloo.
SETTINGS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "deepspeed": {
        "fp32": [{"precision": "fp32", "zero": stage} for stage in (0, 1, 2)],
        "bf16": [{"precision": "autocast", "zero": 0}, *({"precision": "bf16", "zero": stage} for stage in (1, 2))],
    },
    "hugging_face": {
        "fp32": [{"precision": "fp32", "experts": how, "bucket_mb": 25} for how in ("eager", "grouped_mm")],
        "bf16": [{"precision": "autocast", "experts": how, "bucket_mb": 25} for how in ("eager", "grouped_mm")],
    },
}


def train_spec(folder: Path, precision: str) -> Path:
    """The training spec in this precision."""
    path = folder / "train.yaml"
    dump(load(TrainSpec, TRAIN).model_copy(update={"precision": precision}), path, "Written by bench_rivals.py.")
    return path


def planned(folder: Path, precision: str) -> Path:
    """The plan that the engine runs: for the load of the first steps."""
    folder.mkdir(parents=True)
    profiles, first, recorded, plan = (folder / name for name in ("profiles", "first.yaml", "load", "plan.yaml"))
    length, train = load(TrainSpec, TRAIN).sequence_length, train_spec(folder, precision)
    kernels = ("--precision", precision, "--sequence-lengths", length)
    hetermoe("profile", "--quick", "--model", MODEL, *kernels, "--output", profiles)
    inputs = ("--model", MODEL, "--cluster", CLUSTER, "--train", train, "--profiles", profiles)
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


def fastest(python: Path, folder: Path, job: dict[str, Any], variants: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rival's setting with the least median step on this machine; they take turns."""
    with ExitStack() as stack:
        rivals = [
            stack.enter_context(Rival(python, folder / str(number), job | {"variant": variant}))
            for number, variant in enumerate(variants)
        ]
        for one in rivals:
            one.wait_ready()
        seconds: list[list[float]] = [[] for _ in rivals]
        for trial in range(TRIALS):
            for one, found in zip(rivals, seconds, strict=True):
                found += one.train(trial * TRIAL_STEPS, (trial + 1) * TRIAL_STEPS).seconds[TRIAL_WARM_UP:]
    medians = [median(found) for found in seconds]
    for one, found in zip(rivals, medians, strict=True):
        print(f"{found:.3f} s a step: {one.name}", file=sys.stderr)
    return variants[medians.index(min(medians))]


def take_turns(
    plans: dict[str, Path], rivals: dict[Entrant, Rival], kernels: dict[str, Kernels], folder: Path
) -> Found:
    """All rounds of all; who begins moves on by one each round."""
    entrants: list[Entrant] = [*((ENGINE, precision) for precision in plans), *rivals]
    found: Found = {entrant: [] for entrant in [*entrants, *((KERNELS, precision) for precision in kernels)]}
    for number in range(ROUNDS):
        start, stop = number * STEPS, (number + 1) * STEPS
        turn = number % len(entrants)
        for entrant in entrants[turn:] + entrants[:turn]:
            name, precision = entrant
            if name == ENGINE:
                found[entrant].append(engine_steps(plans[precision], folder / precision / ENGINE, start, stop))
            else:
                found[entrant].append(rivals[entrant].train(start, stop))
        for precision, alone in kernels.items():
            found[KERNELS, precision].append(Steps([], alone.seconds(STEPS)))
        told = ", ".join(f"{' '.join(entrant)} {median(timed(rounds)[-1]):.3f}" for entrant, rounds in found.items())
        print(f"round {number + 1} of {ROUNDS}, seconds a step: {told}", file=sys.stderr)
    return found


def timed(rounds: Sequence[Steps]) -> list[list[float]]:
    """Seconds of the timed steps, by round."""
    return [one.seconds[WARM_UP:] for one in rounds]


def loss_difference(ours: Sequence[Steps], theirs: Sequence[Steps]) -> float:
    """Largest relative difference over the first steps."""
    pairs = zip(ours[0].losses[:COMPARED_STEPS], theirs[0].losses[:COMPARED_STEPS], strict=True)
    return max(abs(one / other - 1) for one, other in pairs)


def faster_precision(found: Found, name: str) -> list[Steps]:
    """The rounds in the precision in which `name` takes less time."""
    return min((found[name, precision] for precision in PRECISIONS), key=seconds_a_step)


def seconds_a_step(rounds: Sequence[Steps]) -> float:
    """Median over rounds of their medians."""
    return median(map(median, timed(rounds)))


def judge(found: Found) -> tuple[list[bars.Bar], dict[str, Any]]:
    """Bars, and the ratios that they were computed from."""
    result, ratios = [], {}
    for name, limit in LIMITS.items():
        pairs = {
            "in fp32": (found[ENGINE, "fp32"], found[name, "fp32"]),
            "each in its faster precision": (faster_precision(found, ENGINE), faster_precision(found, name)),
        }
        for how, (ours, theirs) in pairs.items():
            measured = ratio(timed(ours), timed(theirs))
            ratios[f"{ENGINE} over {name}, {how}"] = asdict(measured)
            what = f"engine over {name}, {how}: step time"
            result += [
                bars.at_most(f"{what}, median over rounds", measured.median, limit),
                bars.at_most(f"{what}, upper end of the 95 % interval", measured.high, limit),
            ]
        for precision, tolerance in LOSS_TOLERANCE.items():
            alone = ratio(timed(found[KERNELS, precision]), timed(found[name, precision]))
            ratios[f"{KERNELS} over {name}, in {precision}"] = asdict(alone)
            difference = loss_difference(found[ENGINE, precision], found[name, precision])
            what = f"engine against {name} in {precision}: relative difference of the first losses"
            result.append(bars.at_most(what, difference, tolerance))
    return result, ratios


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """Install, plan, choose variants, take turns."""
    torch.set_num_threads(1)
    python = environment()
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    model, train = load_model(str(MODEL)), load(TrainSpec, TRAIN)
    job = write_job(FOLDER / "job", model, train, ROUNDS * STEPS)
    plans = {precision: planned(FOLDER / precision, precision) for precision in PRECISIONS}
    jobs: dict[Entrant, dict[str, Any]] = {}
    for name, precision in product(LIMITS, PRECISIONS):
        mine = job | {"rival": name}
        variant = fastest(python, FOLDER / precision / name / "trials", mine, SETTINGS[name][precision])
        jobs[name, precision] = mine | {"variant": variant}
    with ExitStack() as stack:
        rivals = {
            (name, precision): stack.enter_context(Rival(python, FOLDER / precision / name, mine))
            for (name, precision), mine in jobs.items()
        }
        for rival in rivals.values():
            rival.wait_ready()
        kernels = {precision: Kernels(model, train, precision, WORLD_SIZE) for precision in PRECISIONS}
        found = take_turns(plans, rivals, kernels, FOLDER)
    result, ratios = judge(found)
    result += [
        bars.at_least("interleaved rounds", len(found[ENGINE, "fp32"]), 10),
        bars.at_most("seconds of this benchmark, without installing", time.monotonic() - began, MOST_SECONDS),
    ]
    return result, {
        "pinned": PINNED,
        "variants": {" ".join(entrant): mine["variant"] for entrant, mine in jobs.items()},
        "ratios": ratios,
        "median_seconds": {" ".join(entrant): seconds_a_step(rounds) for entrant, rounds in found.items()},
        "rounds": {" ".join(entrant): [asdict(one) for one in rounds] for entrant, rounds in found.items()},
        "model": model.model_dump(),
        "train": train.model_dump(),
    }


if __name__ == "__main__":
    try:
        bars.report(__doc__, measure)
    except UserError as error:
        print(f"bench_rivals: error: {error}", file=sys.stderr)
        sys.exit(int(error.code))
