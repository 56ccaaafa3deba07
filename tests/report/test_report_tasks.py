"""report/tasks.py: categories, roles, seconds in words, the median step."""

import pytest

from builders import make_layout
from hetermoe_cli.report.tasks import CATEGORIES, category, in_words, median_step, role, shift_of
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.trace import Span, Trace, display_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("3AF1", "attention forward"),
        ("3AB1", "attention backward"),
        ("3EF1", "expert forward"),
        ("3EB1", "expert backward"),
        ("3DF1", "dispatch"),
        ("3DB1", "dispatch"),
        ("3CF1", "combine"),
        ("3CB1", "combine"),
        ("head 2", "head"),
        ("synchronise 0", "synchronise"),
        ("optimizer 0", "optimizer"),
        ("validation", "other"),
    ],
)
def test_category_of_a_name(name: str, expected: str) -> None:
    assert category(name) == expected


def test_every_task_has_a_category_of_its_own() -> None:
    every = [Action(kind, direction) for kind in Kind for direction in Pass]
    every.remove(Action(Kind.REDUCE, Pass.FORWARD))  # gradients come from backward
    found = {category(display_name(action)) for action in every}
    assert found == set(CATEGORIES) - {"other"}


def test_roles() -> None:
    layout = make_layout((1, 1, 0, 0), (0, 2, 2, 0))
    assert [role(layout, rank) for rank in range(4)] == ["attention", "attention + experts", "experts", "unused"]
    assert role(make_layout((1, 0), (0, 2), replicated=2), 0) == "attention + experts"
    apart = layout.model_copy(update={"head": [1, 0, 2, 5]})
    wanted = ["attention + 12 % of the head", "attention + experts", "experts + 25 % of the head", "62 % of the head"]
    assert [role(apart, rank) for rank in range(4)] == wanted


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "-"),
        (1234.5, "1234 s"),
        (34.064, "34.06 s"),
        (1.0, "1.000 s"),
        (0.59942, "599.4 ms"),
        (1.63e-5, "16.30 µs"),
        (2e-8, "0.02 µs"),
    ],
)
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_shifts_in_words() -> None:
    plain = make_layout((1, 1, 1, 0), (0, 0, 0, 4), micro_batches=4)
    assert [shift_of(plain, rank) for rank in range(4)] == [""] * 4
    layout = plain.model_copy(update={"shifts": [[0, 1, 3], [2], [0, 1, 2, 3], []]})
    words = [" in 3 of 4 micro-batches", " in 1 of 4 micro-batches", "", ""]
    assert [shift_of(layout, rank) for rank in range(4)] == words


def trace_of(*ends: float) -> Trace:
    """One task a step, ending at `ends`."""
    return Trace("measured", [Span(0, "compute", "0AF0", 0.0, end, step) for step, end in enumerate(ends)])


@pytest.mark.parametrize(("ends", "step"), [((3.0, 1.0, 2.0), 2), ((4.0, 1.0, 2.0, 3.0), 2), ((5.0,), 0)])
def test_the_median_step(ends: tuple[float, ...], step: int) -> None:
    assert {span.step for span in median_step(trace_of(*ends)).spans} == {step}


def test_a_trace_of_nothing_has_no_median_step() -> None:
    assert median_step(Trace("measured")).spans == []
