"""Bench: the runs of several plans against the first one: ratios with spread, predicted beside measured.

All seconds are those of the plans' devices: an emulated run's are divided by its time scale.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.report.run_figures import RunFigures, figures, read_run, timed_steps
from hetermoe_cli.report.tables import table
from hetermoe_cli.report.tasks import in_words
from hetermoe_cli.runtime.run.recorder import read_metrics

if TYPE_CHECKING:
    from rich.console import Group

LEAST_FOR_ORDER = 3  # plans, for a rank correlation to say something
_RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Sample:
    """One run: seconds of its timed steps, and its figures."""

    folder: Path
    seconds: list[float]
    figures: RunFigures

    @property
    def scale(self) -> float:
        """Seconds of the run per second of the plan's devices."""
        return self.figures.time_scale


@dataclass(frozen=True)
class Ratio:
    """Iteration time over the first plan's of the same round: median over rounds, their range, and the 95 % interval
    of a bootstrap that draws rounds, and steps within them."""

    median: float
    low: float
    high: float
    least: float
    most: float


@dataclass(frozen=True)
class Entry:
    """One plan. `measured` is the median over rounds of a run's median step; `predicted` is the plan's own figure,
    `replayed` the simulation with the expert rows that were really sent. Errors are measured over expected, less one.
    """

    name: str
    plan: str
    schedule: str
    runs: list[str]
    measured_seconds: float
    predicted_seconds: float
    replayed_seconds: float | None
    predicted_error: float
    replayed_error: float | None
    ratio: Ratio
    predicted_ratio: float
    replayed_ratio: float | None
    tokens_per_second: float
    expert_imbalance: float
    emulation_valid: bool | None
    invalid_runs: int
    overruns: int | None


@dataclass(frozen=True)
class Bench:
    """All plans, the first one first. Tau: Kendall's rank correlation of expected and measured iteration times."""

    emulated: bool
    router: str
    rounds: int
    steps: int
    warm_up: int
    entries: list[Entry]
    predicted_tau: float | None
    replayed_tau: float | None
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def read_sample(folder: Path, warm_up: int) -> Sample:
    """A finished run folder; UserError if it holds no step."""
    found, run = figures(folder, warm_up), read_run(folder)
    steps = timed_steps(run, read_metrics(folder), warm_up)
    return Sample(folder, [line["iteration_seconds"] / run.time_scale for line in steps], found)


def summarise(plans: dict[str, Path], samples: dict[str, list[Sample]], warm_up: int, notes: list[str]) -> Bench:
    """Compare plans (name -> file) by their runs (name -> one a round)."""
    first = next(iter(plans))
    base = samples[first]
    entries = [_entry(name, plan, samples[name], base) for name, plan in plans.items()]
    measured = [entry.measured_seconds for entry in entries]
    replayed = [entry.replayed_seconds for entry in entries if entry.replayed_seconds is not None]
    figures_of_first = base[0].figures
    return Bench(
        emulated=figures_of_first.emulated,
        router=figures_of_first.router,
        rounds=len(base),
        steps=figures_of_first.steps,
        warm_up=warm_up,
        entries=entries,
        predicted_tau=_tau([entry.predicted_seconds for entry in entries], measured),
        replayed_tau=_tau(replayed, measured) if len(replayed) == len(entries) else None,
        notes=notes,
    )


def _entry(name: str, plan: Path, runs: list[Sample], base: list[Sample]) -> Entry:
    measured, predicted, replayed = _measured(runs), _predicted(runs), _replayed(runs)
    replayed_base = _replayed(base)
    found = [run.figures for run in runs]
    invalid = sum(figure.emulation_valid is False for figure in found)
    return Entry(
        name=name,
        plan=str(plan),
        schedule="; ".join(str(group.schedule) for group in read_run(runs[0].folder).plan.groups),
        runs=[str(run.folder) for run in runs],
        measured_seconds=measured,
        predicted_seconds=predicted,
        replayed_seconds=replayed,
        predicted_error=measured / predicted - 1,
        replayed_error=None if replayed is None else measured / replayed - 1,
        ratio=ratio([run.seconds for run in runs], [run.seconds for run in base]),
        predicted_ratio=predicted / _predicted(base),
        replayed_ratio=None if replayed is None or replayed_base is None else replayed / replayed_base,
        tokens_per_second=median(figure.tokens_per_second for figure in found),
        expert_imbalance=median(figure.expert_imbalance for figure in found),
        emulation_valid=all(figure.emulation_valid for figure in found) if found[0].emulated else None,
        invalid_runs=invalid,
        overruns=sum(figure.overruns or 0 for figure in found) if found[0].emulated else None,
    )


def _measured(runs: list[Sample]) -> float:
    return median(median(run.seconds) for run in runs)


def _predicted(runs: list[Sample]) -> float:
    return runs[0].figures.predicted_seconds / runs[0].scale


def _replayed(runs: list[Sample]) -> float | None:
    found = [run.figures.replayed_seconds / run.scale for run in runs if run.figures.replayed_seconds is not None]
    return median(found) if found else None


def ratio(runs: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Ratio:
    """Of step seconds, one list a round, against those of the first plan in the same rounds."""
    if runs is base or list(runs) == list(base):
        return Ratio(1.0, 1.0, 1.0, 1.0, 1.0)
    each = [median(run) / median(other) for run, other in zip(runs, base, strict=True)]
    random = np.random.default_rng(0)
    drawn = np.array([_medians(run, random) / _medians(other, random) for run, other in zip(runs, base, strict=True)])
    rounds = random.integers(0, len(each), drawn.shape)
    low, high = np.percentile(np.median(np.take_along_axis(drawn, rounds, axis=0), axis=0), _INTERVAL)
    return Ratio(median(each), float(low), float(high), min(each), max(each))


def _medians(seconds: Sequence[float], random: np.random.Generator) -> NDArray[np.float64]:
    """Medians [_RESAMPLES] of as many steps drawn with replacement."""
    drawn = random.choice(np.asarray(seconds, np.float64), (_RESAMPLES, len(seconds)))
    medians: NDArray[np.float64] = np.median(drawn, axis=1)
    return medians


def _tau(expected: Sequence[float], measured: Sequence[float]) -> float | None:
    return kendall_tau(expected, measured) if len(measured) >= LEAST_FOR_ORDER else None


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's tau-b: ties in one alone count against it; None where all values of one are equal."""
    pairs = list(combinations(zip(one, other, strict=True), 2))
    signs = [(np.sign(a[0] - b[0]), np.sign(a[1] - b[1])) for a, b in pairs]
    told = sum(s != 0 for s, _ in signs), sum(t != 0 for _, t in signs)
    if not all(told):
        return None
    return float(sum(s * t for s, t in signs) / np.sqrt(float(told[0]) * told[1]))


def render(bench: Bench) -> "Group":
    """A table, the order, and the notes, for a rich console."""
    from rich.console import Group

    kind = "EMULATED" if bench.emulated else "measured"
    title = (
        f"{kind} iterations, {bench.router} router: {_plural(bench.rounds, 'round')} of {bench.steps} steps, "
        f"the first {bench.warm_up} left out"
    )
    columns = ["plan", kind.lower(), "predicted", "with its loads", "ratio", "95 %", "range", "predicted", "tokens/s"]
    columns += ["emulation"] * bench.emulated
    lines = [f"{entry.name}: {entry.schedule}" for entry in bench.entries]
    lines += [
        f"ratio: iteration time over that of {bench.entries[0].name} in the same round (below 1: faster): median, 95 % "
        "interval of a bootstrap over rounds and steps, least to most of a round, and the ratio of the predictions"
    ]
    if bench.predicted_tau is not None:
        replayed = "" if bench.replayed_tau is None else f", {bench.replayed_tau:.2f} with the loads really sent"
        lines.append(
            f"order of the plans, predicted against {kind.lower()}: Kendall's tau {bench.predicted_tau:.2f}{replayed}"
        )
    lines += [f"note: {note}" for note in bench.notes]
    if any(entry.invalid_runs for entry in bench.entries):
        lines.append(
            "INVALID: real work did not keep up with its targets, so these figures tell of this machine: leave it "
            "alone, or raise --time-scale"
        )
    return Group(table(title, columns, [_row(entry, bench) for entry in bench.entries]), *lines)


def _row(entry: Entry, bench: Bench) -> list[str]:
    ratio, first = entry.ratio, entry is bench.entries[0]
    cells = [
        entry.name,
        in_words(entry.measured_seconds),
        _against(entry.predicted_seconds, entry.predicted_error),
        "not recorded" if entry.replayed_seconds is None else _against(entry.replayed_seconds, entry.replayed_error),
        f"{ratio.median:.3f}",
        "" if first else f"{ratio.low:.3f}-{ratio.high:.3f}",
        "" if first or bench.rounds == 1 else f"{ratio.least:.3f}-{ratio.most:.3f}",
        f"{entry.predicted_ratio:.3f}",
        f"{entry.tokens_per_second:,.0f}",
    ]
    if bench.emulated:
        cells.append(f"INVALID in {entry.invalid_runs} of {bench.rounds}" if entry.invalid_runs else "valid")
    return cells


def _against(seconds: float, error: float | None) -> str:
    return in_words(seconds) + ("" if error is None else f" ({error:+.1%})")


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")
