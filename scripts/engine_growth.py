"""How the time of a real iteration grows with layers, experts, sequence length and ranks: runs, fits and a picture.

Half of the ranks attend, the other half hosts the experts, one thread each; the global batch is the same for all
numbers of ranks, so that their work is. More ranks than cores take turns on these: that curve tells what a rank costs
beside its work, not how the engine would scale over machines.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo import ROOT, hetermoe
from engine_shapes import Shape, Widths, measure_profile, write_plan

PICTURE = ROOT / "docs/engine-scaling.svg"
WIDTHS = Widths("growth", hidden=128, ffn=256, heads=4)
BASE = {"layers": 4, "experts": 12, "sequence length": 64, "ranks": 2}
GROWTH = {
    "layers": (2, 4, 8, 12),
    "experts": (6, 12, 24, 48),
    "sequence length": (32, 64, 128, 256, 512),
    "ranks": (2, 4, 6, 8),
}
DEGREES = {"layers": 1, "experts": 1, "sequence length": 2, "ranks": 1}  # attention is quadratic
SEQUENCES, MICRO_BATCHES = 12, 4
STEPS, WARM_UP = 9, 3


@dataclass(frozen=True)
class Fit:
    """Seconds as a polynomial of a size, constant first; `worst`: largest relative distance of a point."""

    coefficients: list[float]
    worst: float

    def __call__(self, size: float) -> float:
        """Seconds at a size."""
        return float(np.polynomial.polynomial.polyval(size, self.coefficients))


def fit(sizes: list[float], seconds: list[float], degree: int) -> Fit:
    """Least squares of relative distances."""
    weights = 1 / np.asarray(seconds)
    found = np.polynomial.polynomial.polyfit(sizes, seconds, degree, w=weights)
    off = np.polynomial.polynomial.polyval(np.asarray(sizes), found) * weights - 1
    return Fit(found.tolist(), float(np.abs(off).max()))


def in_words(found: Fit) -> str:
    """`12 ms + 3.4 ms n`, n being the size, with the largest distance of a point."""
    text = ""
    for power, coefficient in enumerate(found.coefficients):
        sign = "- " if coefficient < 0 else "+ " if text else ""
        text += f"{' ' * bool(text)}{sign}{abs(coefficient) * 1e3:.3g} ms{('', ' n', ' n²')[power]}"
    return f"{text} (±{found.worst:.0%})"


def shape(layers: int, experts: int, length: int, ranks: int) -> Shape:
    """One point."""
    half = ranks // 2
    return Shape(
        WIDTHS, layers, experts, length, (SEQUENCES // half,) * half + (0,) * half, tuple(range(half, ranks)),
        MICRO_BATCHES,
    )  # fmt: skip


def growth(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Median iteration at every point, each in a run of its own; the others as in BASE."""
    profiles = folder / "profiles"
    profiles.mkdir(parents=True)
    measure_profile(WIDTHS, GROWTH["sequence length"], profiles)
    known: dict[tuple[int, ...], float] = {}
    found: dict[str, list[dict[str, float]]] = {}
    for name, sizes in GROWTH.items():
        found[name] = []
        for size in sizes:
            point = tuple((BASE | {name: size}).values())
            if point not in known:
                known[point] = _seconds(folder, profiles, point)
            found[name].append({"at": size, "seconds": known[point]})
    return found


def _seconds(folder: Path, profiles: Path, point: tuple[int, ...]) -> float:
    name = "-".join(map(str, point))
    plan = write_plan(shape(*point), profiles, folder / f"{name}.yaml")
    timing = ("--repeats", 1, "--steps", STEPS, "--warm-up", WARM_UP, "--trace-steps", 0)
    result = hetermoe("bench", plan, "--output", folder / name, "--router", "balanced", *timing)
    shutil.rmtree(folder / name)
    seconds: float = result["entries"][0]["measured_seconds"]
    return seconds


def fits(found: dict[str, list[dict[str, float]]]) -> dict[str, Fit]:
    """One of each curve."""
    return {
        name: fit([point["at"] for point in points], [point["seconds"] for point in points], DEGREES[name])
        for name, points in found.items()
    }


def draw(found: dict[str, list[dict[str, float]]], curves: dict[str, Fit], path: Path) -> None:
    """Points and fits, a panel for each size."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(16, 3.6), layout="constrained")
    for panel, (name, points) in zip(panels, found.items(), strict=True):
        sizes = [point["at"] for point in points]
        panel.plot(sizes, [point["seconds"] * 1e3 for point in points], "o", label="measured, median")
        line = np.linspace(min(sizes), max(sizes), 100)
        panel.plot(line, [curves[name](size) * 1e3 for size in line], label="fit")
        panel.set_title(in_words(curves[name]), fontsize="small")
        panel.set_xticks(sizes)
        panel.set_ylim(0, 1.1e3 * max(point["seconds"] for point in points))
        panel.set_xlabel(f"n = {name}" + f", sharing {os.cpu_count()} cores" * (name == "ranks"))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms an iteration")
    panels[0].legend()
    figure.suptitle(_caption(), fontsize="medium")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "engine"}):
        figure.savefig(path, metadata={"Date": None})


def _caption() -> str:
    others: dict[str, Any] = {"hidden size": WIDTHS.hidden, "FFN": WIDTHS.ffn, **BASE}
    sizes = ", ".join(f"{name} {value}" for name, value in others.items())
    batch = f"{SEQUENCES * MICRO_BATCHES} sequences in {MICRO_BATCHES} micro-batches"
    return (
        f"Real training on {os.cpu_count()} CPU cores, a thread a rank, half of the ranks host the experts\n"
        f"{batch}; where not varied: {sizes}"
    )
