"""Calibration in words: tables for people, one object for machines."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hetermoe_cli.report.calibration import Calibration, Row
from hetermoe_cli.report.tables import table
from hetermoe_cli.report.tasks import in_words

if TYPE_CHECKING:
    from rich.console import Group

_COLUMNS = ("device", "kind", "tasks", "size", "old", "new", "ratio", "spread", "ratio by size")


def as_dict(calibration: Calibration) -> dict[str, Any]:
    """For --json: all but the contents of the files."""
    return {
        "run": calibration.run,
        "origin": calibration.origin,
        "steps": calibration.steps,
        "rows": [asdict(row) for row in calibration.rows],
        "link": _link(calibration),
        "iteration": asdict(calibration.iteration),
        "notes": calibration.notes,
    }


def _link(calibration: Calibration) -> dict[str, Any] | None:
    if not calibration.link:
        return None
    link = calibration.link
    states = {"old": link.old.model_dump(mode="json"), "new": link.new.model_dump(mode="json")}
    return asdict(link) | states


def render(calibration: Calibration) -> "Group":
    """The table of what moved, the link, and the prediction before and after."""
    from rich.console import Group

    steps = "one step" if calibration.steps == 1 else f"{calibration.steps} steps"
    title = f"{calibration.origin} against predicted seconds of a task, medians, {steps} after warm-up"
    return Group(table(title, _COLUMNS, map(_cells, calibration.rows), text_columns=2), *_lines(calibration))


def _cells(row: Row) -> list[str]:
    low, high = (f"{size:,.0f}" for size in row.sizes)
    return [
        row.device,
        row.kind,
        str(row.tasks),
        low if low == high else f"{low} to {high}",
        in_words(row.old_seconds),
        in_words(row.new_seconds),
        f"{row.ratio:.3f}",
        f"{row.spread:.0%}",
        _by_size(row),
    ]


def _by_size(row: Row) -> str:
    """Ratios of the smallest and the largest size that have their own."""
    words = [f"{size:,.0f}: {ratio:.2f}" for size, ratio in row.knots]
    return " .. ".join(words[:1] + words[1:][-1:]) or "-"


def _lines(calibration: Calibration) -> list[str]:
    lines = []
    if link := calibration.link:
        lines.append(
            f"link {link.name}: a transfer takes {in_words(link.measured_seconds)} (spread {link.spread:.0%}, "
            f"{link.transfers} transfers), predicted {in_words(link.old_seconds)}: latency "
            f"{link.old.latency_microseconds:,.0f} -> {link.new.latency_microseconds:,.0f} µs"
        )
    iteration = calibration.iteration
    measured = iteration.measured_seconds
    before, after = (
        f"{in_words(seconds)} ({seconds / measured:.3f} of it)"
        for seconds in (iteration.before_seconds, iteration.after_seconds)
    )
    lines.append(
        f"iteration: {calibration.origin} {in_words(measured)}; predicted {before} before, {after} after calibration"
    )
    return lines + [f"note: {note}" for note in calibration.notes]
