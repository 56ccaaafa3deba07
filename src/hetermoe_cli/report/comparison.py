"""Comparison: a predicted trace against a measured one, task by task."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from hetermoe_cli.errors import UserError
from hetermoe_cli.report.tables import table
from hetermoe_cli.report.tasks import CATEGORIES, category, in_words
from hetermoe_cli.trace import Trace

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

LARGEST = 10
NEGLIGIBLE = 1e-3  # of the longer duration: no deviation worth a line


@dataclass(frozen=True)
class Pair:
    """Predicted and measured seconds of the same thing."""

    predicted: float
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where nothing was predicted."""
        return self.measured / self.predicted if self.predicted else None

    @property
    def difference(self) -> float:
        """How far they are apart, without sign."""
        return abs(self.measured - self.predicted)


@dataclass(frozen=True)
class CategoryRow:
    """One category of tasks. `sums` are seconds an iteration, added over ranks; `medians` those of a single task."""

    category: str
    tasks: int
    sums: Pair
    medians: Pair


@dataclass(frozen=True)
class Deviation:
    """One task of one rank whose duration differs."""

    rank: int
    lane: str
    name: str
    seconds: Pair


@dataclass(frozen=True)
class BusyRow:
    """Share of the iteration in which a rank computes."""

    rank: int
    share: Pair


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. A task that only one trace has is counted and left out of everything else."""

    origins: tuple[str, str]
    steps: int
    iteration: Pair
    categories: list[CategoryRow]
    deviations: list[Deviation]
    busy: list[BusyRow]
    only_predicted: int
    only_measured: int

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"ratio": self.iteration.ratio, **asdict(self)}


_Task = tuple[int, str, str]  # rank, lane, name


def compare(predicted: Trace, measured: Trace) -> Comparison:
    """Compare two traces of one plan; of several steps the median of every duration counts.

    UserError where they have no task in common.
    """
    one, other = _durations(predicted), _durations(measured)
    pairs = {task: Pair(one[task], other[task]) for task in one if task in other}
    if not pairs:
        raise UserError("the predicted and the measured trace have no task in common: are they of the same plan?")
    differing = [
        task for task, pair in pairs.items() if pair.difference > NEGLIGIBLE * max(pair.predicted, pair.measured)
    ]
    differing.sort(key=lambda task: -pairs[task].difference)
    world = 1 + max(span.rank for trace in (predicted, measured) for span in trace.spans)
    shares = zip(predicted.busy_share(world), measured.busy_share(world), strict=True)
    return Comparison(
        origins=(predicted.origin, measured.origin),
        steps=len(measured.step_seconds()),
        iteration=Pair(predicted.seconds, measured.seconds),
        categories=_categories(pairs),
        deviations=[Deviation(*task, pairs[task]) for task in differing[:LARGEST]],
        busy=[BusyRow(rank, Pair(*share)) for rank, share in enumerate(shares)],
        only_predicted=len(one) - len(pairs),
        only_measured=len(other) - len(pairs),
    )


def _durations(trace: Trace) -> dict[_Task, float]:
    """Median seconds of every task over the steps."""
    found: dict[_Task, list[float]] = defaultdict(list)
    for span in trace.spans:
        found[span.rank, span.lane, span.name].append(span.end - span.start)
    return {task: median(seconds) for task, seconds in found.items()}


def _categories(pairs: dict[_Task, Pair]) -> list[CategoryRow]:
    members: dict[str, list[Pair]] = defaultdict(list)
    for (_, _, name), pair in pairs.items():
        members[category(name)].append(pair)
    return [_category_row(name, members[name]) for name in CATEGORIES if name in members]


def _category_row(name: str, pairs: list[Pair]) -> CategoryRow:
    predicted, measured = [p.predicted for p in pairs], [p.measured for p in pairs]
    return CategoryRow(name, len(pairs), Pair(sum(predicted), sum(measured)), Pair(median(predicted), median(measured)))


def render(comparison: Comparison) -> "Group":
    """Tables for a rich console."""
    from rich.console import Group

    predicted, measured = comparison.origins
    pair = comparison.iteration
    steps = "one step" if comparison.steps == 1 else f"median of {comparison.steps} steps"
    lines = [
        f"{measured} {in_words(pair.measured)} an iteration ({steps}), "
        f"{predicted} {in_words(pair.predicted)}: ratio {_ratio(pair)}"
    ]
    if comparison.only_predicted or comparison.only_measured:
        counts = f"{comparison.only_predicted} {predicted}, {comparison.only_measured} {measured}"
        lines.append(f"tasks in one trace only: {counts}")
    return Group(*lines, _category_table(comparison), _deviation_table(comparison), _busy_table(comparison))


def _ratio(pair: Pair) -> str:
    return "-" if pair.ratio is None else f"{pair.ratio:.3f}"


def _in_words(pair: Pair) -> list[str]:
    return [in_words(pair.predicted), in_words(pair.measured), _ratio(pair)]


def _category_table(comparison: Comparison) -> "Table":
    columns = ["tasks", "number", *("sum " + word for word in comparison.origins), "ratio"]
    columns += [*("median " + word for word in comparison.origins), "ratio"]
    rows = [
        [row.category, str(row.tasks), *_in_words(row.sums), *_in_words(row.medians)] for row in comparison.categories
    ]
    return table("Seconds of tasks, summed over ranks", columns, rows)


def _deviation_table(comparison: Comparison) -> "Table":
    rows = [[str(d.rank), d.lane, d.name, *_in_words(d.seconds)] for d in comparison.deviations]
    return table("Largest deviations", ["rank", "lane", "task", *comparison.origins, "ratio"], rows, text_columns=3)


def _busy_table(comparison: Comparison) -> "Table":
    rows = [[str(b.rank), f"{b.share.predicted:.1%}", f"{b.share.measured:.1%}"] for b in comparison.busy]
    return table("Busy share", ["rank", *comparison.origins], rows)
