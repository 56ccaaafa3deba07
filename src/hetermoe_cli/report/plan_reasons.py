"""The part of a plan's table that says why: what binds it, what lost, and what more or fewer devices would do."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hetermoe_cli.planner.what_if import unchanged
from hetermoe_cli.report.tables import table
from hetermoe_cli.report.tasks import in_words, ranges
from hetermoe_cli.spec.explanation import Explanation, Variant
from hetermoe_cli.spec.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table

SMALLEST_SHARE = 0.01  # of the critical path that is worth a word


def binding_lines(explanation: Explanation) -> Iterator[str]:
    """The critical path by resource, and memory that is full or stands in the way."""
    yield f"binding: {explanation.binding}; critical path: {path_text(explanation.critical_path)}"
    for tight in explanation.tight_memory:
        where = f"{tight.device} (ranks {ranges(tight.ranks)})"
        yield f"memory of {where} is {tight.share:.0%} full, most of it {tight.largest_kind}"
    if explanation.memory_excluded:
        yield f"memory rules out a faster order: {explanation.memory_excluded}"


def path_text(path: dict[str, float]) -> str:
    """`experts of V100 60%, attention of A40 25%, other 1%`."""
    shown = {name: share for name, share in path.items() if share >= SMALLEST_SHARE}
    rest = sum(path.values()) - sum(shown.values())
    if rest >= SMALLEST_SHARE / 2:
        shown["other"] = rest
    return ", ".join(f"{name} {share:.0%}" for name, share in shown.items())


def runner_ups_table(explanation: Explanation) -> "Table":
    """The best layout of every other family, and why it lost."""
    rows = [
        (lost.family, lost.schedule, lost.reason, in_words(lost.iteration_seconds), f"{lost.slower:.1%}")
        for lost in explanation.runner_ups
    ]
    return table("Runner-ups", ["family", "best", "why it lost", "iteration", "slower"], rows, text_columns=3)


def what_if_table(plan: Plan) -> "Table":
    """The plan's cluster and its variants."""
    variants = [unchanged(plan), *plan.what_if]
    priced = any(variant.price_per_hour for variant in variants)
    columns = ["change", "devices", "binding", "iteration", "tokens/s", "a device", "change in speed", "gap"]
    rows = [_row(variant, priced) for variant in variants]
    return table("What if", columns + ["price/h", "tokens/$"] * priced, rows, text_columns=3)


def _row(variant: Variant, priced: bool) -> list[str]:
    devices = ", ".join(f"{count} {name}" for name, count in variant.devices.items())
    cells = [variant.change or "as it is", devices, variant.reason or variant.binding]
    prices = [_number(variant.price_per_hour, ",.2f"), _number(variant.tokens_per_dollar, ",.0f")]
    return [
        *cells,
        in_words(variant.iteration_seconds or 0.0),
        _number(variant.tokens_per_second, ",.0f"),
        _number(variant.tokens_per_second_per_device, ",.0f"),
        _number(variant.gained, "+.1%") if variant.change else "",
        _number(variant.gap, ".2%"),
        *(prices if priced else []),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
