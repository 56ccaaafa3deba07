"""The engine on this machine's CPU, nothing emulated: against its own simulation, its overlap, and its growth.

One attending rank and one that hosts the experts (1+1), a thread each, the same global batch in four micro-batches
(zebra), in four of which one at a time is in flight (sequential), and in one (R = 1); and plain expert parallelism
(EP). They run in turn. Both ranks of 1+1 have work for the same time, as a planner would see to: where one has less, it
waits for every message. So the experts' width is chosen first. Overlap is measured over gloo, as between machines: in
shared memory there is next to nothing to hide; of four micro-batches, and of eight (r8), where a rank has three times
as much other work while a message is under way, and the first and last messages of a pass count half as much. What is
compared is defined in engine_replay.py and engine_overlap.py. Leave the machine alone.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import bars
import engine_growth
from demo import ROOT, hetermoe
from engine_overlap import exposure, loads, stretch
from engine_replay import Run, compare, read
from engine_shapes import Shape, Widths, measure_profile, write_plan

FOLDER = ROOT / "runs" / "bench-engine"
FFN_SIZES = (416, 448, 480, 512)
OVERLAP = ("zebra", "sequential", "r8")  # over gloo
IN_TURN = ("zebra", "r1", "sequential", "ep")
ROUNDS, STEPS, WARM_UP = 3, 12, 2
MOST_EXCESS, LEAST_HIDDEN, LEAST_GAIN = 0.03, 0.90, 1.5
MOST_SECONDS = 600


def pair(ffn: int) -> Shape:
    """1+1, R = 4."""
    widths = Widths(f"pair-{ffn}", hidden=256, ffn=ffn, heads=8)
    return Shape(widths, layers=4, experts=8, length=512, sequences=(1, 0), hosts=(1,), micro_batches=4)


def shapes(zebra: Shape) -> dict[str, Shape]:
    """What is compared, of one model."""
    return {
        "zebra": zebra,
        "r1": zebra.split(1),
        "r8": replace(zebra, micro_batches=8),
        "sequential": replace(zebra, window=1),
        "ep": replace(zebra, sequences=(2, 2), hosts=(0, 1), micro_batches=1),
    }


def balanced(folder: Path) -> tuple[Shape, Path]:
    """The experts' width at which both ranks work for most nearly the same time, by their stages in a short run over
    gloo; with the folder of its profiles."""
    unevenness = {}
    for ffn in FFN_SIZES:
        shape, mine = pair(ffn), folder / str(ffn)
        mine.mkdir(parents=True)
        measure_profile(shape.widths, [shape.length], mine)
        plan = write_plan(shape, mine, mine / "zebra.yaml")
        steps = ("--steps", STEPS, "--warm-up", WARM_UP, "--trace-steps", STEPS - WARM_UP)
        options = ("--router", "balanced", "--repeats", 1, *steps)
        found = hetermoe("bench", plan, "--output", mine / "runs", *options, HETERMOE_SHARED_MEMORY="0")
        attending, hosting = loads(rounds(found["entries"][0])[0])
        unevenness[ffn] = abs(attending / hosting - 1)
    best = min(unevenness, key=unevenness.__getitem__)
    return pair(best), folder / str(best)


def run(zebra: Shape, profiles: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those in turn, and those over gloo; `hetermoe bench`'s figures."""
    plans = {name: write_plan(shape, profiles, folder / f"{name}.yaml") for name, shape in shapes(zebra).items()}
    timing = ("--repeats", ROUNDS, "--steps", STEPS, "--warm-up", WARM_UP, "--trace-steps", STEPS - WARM_UP)
    options = ("--router", "balanced", *timing)
    in_turn, over_gloo = ([plans[name] for name in names] for names in (IN_TURN, OVERLAP))
    return (
        hetermoe("bench", *in_turn, "--output", folder / "runs", *options),
        hetermoe("bench", *over_gloo, "--output", folder / "gloo", *options, HETERMOE_SHARED_MEMORY="0"),
    )


def rounds(entry: dict[str, Any]) -> list[Run]:
    """The traced runs of a plan."""
    return [read(Path(folder)) for folder in entry["runs"]]


def against_simulation(runs: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    """Medians over rounds."""
    found = {name: [asdict(compare(run)) for run in mine] for name, mine in runs.items()}
    return {name: {key: median(one[key] for one in each) for key in each[0]} for name, each in found.items()}


def overlap(runs: Sequence[Run]) -> dict[str, Any]:
    """Of one shape: means over rounds, for every rank and for both; exposed seconds of a rank over those of the
    iteration."""
    ranks = range(2)
    return {
        "hidden": _hidden(runs, ranks),
        "exposed_share": mean(exposure(run, ranks).exposed_seconds / run.seconds for run in runs) / len(ranks),
        "hidden_per_rank": [_hidden(runs, [rank]) for rank in ranks],
    }


def stretched(runs: dict[str, list[Run]]) -> float:
    """How much longer stages take in the zebra schedule than one micro-batch after another; median over rounds."""
    return median(stretch(one, other) for one, other in zip(runs["zebra"], runs["sequential"], strict=True))


def _hidden(runs: Sequence[Run], ranks: Sequence[int]) -> float:
    found = [exposure(run, ranks) for run in runs]
    return 1 - mean(one.exposed_seconds for one in found) / mean(one.transfer_seconds for one in found)


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """Run, compare, grow, draw."""
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    zebra, profiles = balanced(FOLDER / "trials")
    bench, over_gloo = run(zebra, profiles, FOLDER)
    entries = {entry["name"]: entry for entry in bench["entries"]}
    runs = {name: rounds(entry) for name, entry in entries.items()}
    gloo = {entry["name"]: rounds(entry) for entry in over_gloo["entries"]}
    replayed = against_simulation(runs)
    four, eight = overlap(gloo["zebra"]), overlap(gloo["r8"])
    found = [
        bars.at_most(
            f"{name}: iteration over a simulation with its own stage times, less one", one["excess"], MOST_EXCESS
        )
        for name, one in replayed.items()
    ]
    found += [
        bars.at_least("1+1, R = 4, over gloo: share of communication that is hidden", four["hidden"], LEAST_HIDDEN),
        bars.at_least("1+1, R = 8, over gloo: share of communication that is hidden", eight["hidden"], LEAST_HIDDEN),
        bars.at_least("1+1: speed of R = 4 over R = 1", entries["r1"]["ratio"]["median"], LEAST_GAIN),
    ]
    grown = engine_growth.growth(FOLDER / "growth")
    curves = engine_growth.fits(grown)
    engine_growth.draw(grown, curves, engine_growth.PICTURE)
    found.append(bars.at_most("seconds of this benchmark", time.monotonic() - began, MOST_SECONDS))
    growth = {name: {"points": grown[name], "fit": asdict(curve)} for name, curve in curves.items()}
    return found, {
        "ffn_size": zebra.widths.ffn,
        "bench": bench,
        "against_simulation": replayed,
        "overlap": {"four": four, "eight": eight, "four_in_shared_memory": overlap(runs["zebra"])},
        "stretch": {"over_gloo": stretched(gloo), "in_shared_memory": stretched(runs)},
        "growth": growth,
    }


if __name__ == "__main__":
    bars.report(__doc__, measure)
