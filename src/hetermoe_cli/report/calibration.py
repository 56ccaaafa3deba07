"""Calibration: a run's traces against the cost model, task by task, and the profiles and link that fit them.

Compute tasks are compared with the cost model for the very rows that they had (see run_tasks.py).

Transfers. A span on a lane includes waiting for peers, so it says nothing by itself. What does is the simulator's own
rule: from the moment that all senders were ready and all lanes free, to the moment that the last rank was done. That
needs one clock, so links are fitted only where all ranks live in one node, and a transfer during which another one used
the same ports counts for nothing (the cost model lets them take turns). What several groups sum is one transfer of them
all. The messages of a run are too alike to tell
bandwidth from latency: the bandwidth stays, the latency moves by the median of measured - predicted seconds. Time that
a lane waits for a core is part of it, as it is part of every iteration of such a run. Synchronisation is not fitted:
all of its span but a little is waiting.

What a prediction by medians still misses is what makes tasks differ from their medians: of tasks that wait for each
other the slowest counts. The iteration before and after shows how much that is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

from hetermoe_cli.cost.device import find_table
from hetermoe_cli.errors import UserError
from hetermoe_cli.profiler.refit import KINDS, Fit, fit, point_sizes, refit
from hetermoe_cli.report.link_fit import LinkFit, fit_link
from hetermoe_cli.report.run_figures import REPLAYED_STEPS
from hetermoe_cli.report.run_tasks import Place, RunTasks, Samples, read_run_tasks
from hetermoe_cli.spec.cluster import LinkRecord
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.profile import KernelTable, Profile

_DISTURBED = 0.5  # spread of measured / predicted


@dataclass(frozen=True)
class Row:
    """One kind of task on one device type. Seconds are medians of a task at the run's sizes, by either profile."""

    device: str
    kind: str
    tasks: int
    sizes: tuple[float, float]
    old_seconds: float
    new_seconds: float
    ratio: float
    spread: float
    knots: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Iteration:
    """Medians over the steps used: measured, and simulated with their loads by the old and the new figures."""

    measured_seconds: float
    before_seconds: float
    after_seconds: float


@dataclass(frozen=True)
class Calibration:
    """What moved, and the files to write. Seconds of an emulated run are nominal; `inputs` are the run's own."""

    run: str
    inputs: Inputs
    origin: str
    steps: int
    rows: list[Row]
    link: LinkFit | None
    iteration: Iteration
    notes: list[str]
    profiles: dict[str, Profile]
    links: dict[str, LinkRecord]


def calibrate(folder: Path, *, allow_emulated: bool = False) -> Calibration:
    """Fit the plan's profiles and link to a run folder; UserError if the run has nothing to tell. Writes nothing."""
    run, notes = read_run_tasks(folder, allow_emulated=allow_emulated)
    inputs = run.spec.plan.inputs
    old = run.samples(inputs)
    found = {}
    for (device, kind), samples in old.items():
        if one := fit(samples, point_sizes(_table(inputs, device), kind)):
            found[device, kind] = one
    if not found:
        raise UserError(f"{folder}: its traces hold no compute task of the plan: were they written by this run?")
    link, words = fit_link(inputs, run.copies, run.costs(inputs))
    notes.append(words)
    profiles = _profiles(inputs, found, folder, run.trace.origin)
    notes += _kept(inputs, found) + _disturbed(found)
    links = _links(link, folder, run.trace.origin)
    changed = inputs.model_copy(
        update={
            "profiles": inputs.profiles | profiles,
            "links": inputs.links | {name: record.link for name, record in links.items()},
        }
    )
    rows = _rows(inputs, found, old, run.samples(changed))
    return Calibration(
        str(folder),
        inputs,
        run.trace.origin,
        len(run.steps),
        rows,
        link,
        _iteration(run, inputs, changed),
        notes,
        profiles,
        links,
    )


def _rows(inputs: Inputs, fits: Mapping[Place, Fit], old: Samples, new: Samples) -> list[Row]:
    return [
        Row(
            device,
            kind,
            one.tasks,
            one.sizes,
            median(sample.predicted for sample in old[device, kind]),
            median(sample.predicted for sample in new[device, kind]),
            one.ratio,
            one.spread,
            one.knots,
        )
        for device in inputs.cluster.device_types
        for kind in KINDS
        if (one := fits.get((device, kind)))
    ]


def _profiles(inputs: Inputs, fits: Mapping[Place, Fit], folder: Path, origin: str) -> dict[str, Profile]:
    """Refitted profiles by device type. Seconds of an emulated run are not called measured."""
    result = {}
    for device, profile in inputs.profiles.items():
        mine = {kind: one for (name, kind), one in fits.items() if name == device}
        if mine:
            used = _table(inputs, device)
            comment = f"calibrated from {folder}: {', '.join(kind for kind in KINDS if kind in mine)}"
            result[device] = profile.model_copy(
                update={
                    "source": "measured" if origin == "measured" else profile.source,
                    "date": date.today(),
                    "comment": comment,
                    "tables": [refit(table, mine) if table == used else table for table in profile.tables],
                }
            )
    return result


def _table(inputs: Inputs, device: str) -> KernelTable:
    return find_table(inputs.profiles[device], inputs.model, inputs.train.precision_of(device))


def _kept(inputs: Inputs, fits: Mapping[Place, Fit]) -> list[str]:
    """What the run says nothing about."""
    missing = {device: [kind for kind in KINDS if (device, kind) not in fits] for device in inputs.cluster.device_types}
    return [
        f"{device}: kept as it was, no usable task: {', '.join(kinds)}" for device, kinds in missing.items() if kinds
    ]


def _disturbed(fits: Mapping[Place, Fit]) -> list[str]:
    """Kinds whose tasks differ so much that their median predicts no iteration."""
    kinds = [f"{device} {kind}" for (device, kind), one in fits.items() if one.spread > _DISTURBED]
    return (
        [f"spread above {_DISTURBED:.0%}, so other work may have disturbed the run: {', '.join(kinds)}"]
        if kinds
        else []
    )


def _links(link: LinkFit | None, folder: Path, origin: str) -> dict[str, LinkRecord]:
    if not link:
        return {}
    source = "measured" if origin == "measured" else "modelled"
    comment = f"latency calibrated from {folder}, bandwidth kept"
    record = LinkRecord(
        name=link.name,
        source=source,
        date=date.today(),
        link=link.new,
        spread=round(link.spread, 4),
        comment=comment,
    )
    return {link.name: record}


def _iteration(run: RunTasks, before: Inputs, after: Inputs) -> Iteration:
    """Over the last steps, as in a run's own figures."""
    steps = run.steps[-REPLAYED_STEPS:]
    seconds = run.trace.step_seconds()
    return Iteration(
        median(seconds[step] for step in steps), *(median(run.seconds(each, steps)) for each in (before, after))
    )
