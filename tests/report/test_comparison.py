"""report/comparison.py: what differs between a predicted and a measured trace."""

import io
import json

import pytest
from rich.console import Console

from hetermoe_cli.errors import UserError
from hetermoe_cli.report.comparison import BusyRow, Comparison, Pair, compare, render
from hetermoe_cli.trace import Span, Trace

PREDICTED = Trace(
    "simulated",
    [
        Span(0, "compute", "0AF0", 0.0, 1.0),
        Span(0, "compute", "0AF1", 1.0, 2.0),
        Span(0, "to experts", "0DF0", 1.0, 1.5),
        Span(1, "compute", "0EF0", 1.5, 3.5),
        Span(1, "compute", "optimizer 0", 3.5, 3.5),
        Span(1, "compute", "0EF1", 3.5, 4.0),
    ],
)


def measured_step(step: int, attention: float, end: float) -> list[Span]:
    """Without 0EF1, with a task that nobody predicted."""
    return [
        Span(0, "compute", "0AF0", 0.0, attention, step),
        Span(0, "compute", "0AF1", attention, attention + 1.0, step),
        Span(0, "to experts", "0DF0", attention, attention + 0.5, step),
        Span(1, "compute", "0EF0", 2.0, 5.0, step),
        Span(1, "compute", "optimizer 0", 5.0, end, step),
        Span(1, "compute", "1EF0", end, end, step),
    ]


MEASURED = Trace(
    "measured",
    [*measured_step(5, 1.5, 5.5), *measured_step(6, 9.0, 12.0), *measured_step(7, 1.1, 5.1)],
)


@pytest.fixture
def comparison() -> Comparison:
    return compare(PREDICTED, MEASURED)


def test_iteration_is_the_median_over_steps(comparison: Comparison) -> None:
    assert (comparison.steps, comparison.origins) == (3, ("simulated", "measured"))
    assert comparison.iteration == Pair(4.0, 5.5)
    assert comparison.iteration.ratio == pytest.approx(1.375)


def test_categories_use_the_median_of_every_task(comparison: Comparison) -> None:
    rows = {row.category: row for row in comparison.categories}
    assert list(rows) == ["attention forward", "expert forward", "optimizer", "dispatch"]
    attention = rows["attention forward"]
    assert attention.tasks == 2
    assert (attention.sums.predicted, attention.sums.measured) == pytest.approx((2.0, 2.5))
    assert (attention.medians.predicted, attention.medians.measured) == pytest.approx((1.0, 1.25))
    assert rows["expert forward"].sums == Pair(2.0, 3.0)  # 0EF1 is in one trace only
    assert rows["optimizer"].sums.ratio is None


def test_tasks_of_one_trace_only_are_counted(comparison: Comparison) -> None:
    assert (comparison.only_predicted, comparison.only_measured) == (1, 1)


def test_the_largest_deviations_come_first(comparison: Comparison) -> None:
    named = [(d.rank, d.lane, d.name, d.seconds.measured - d.seconds.predicted) for d in comparison.deviations]
    assert named[0][:3] == (1, "compute", "0EF0")
    assert named[0][3] == pytest.approx(1.0)
    assert {named[1][2], named[2][2]} == {"0AF0", "optimizer 0"}
    assert [abs(difference) for *_, difference in named] == sorted((abs(n[3]) for n in named), reverse=True)


def test_only_ten_deviations_are_listed() -> None:
    spans = [Span(0, "compute", f"{layer}AF0", 0.0, 1.0 + layer) for layer in range(15)]
    same = [span._replace(end=1.0) for span in spans]
    names = [d.name for d in compare(Trace("simulated", same), Trace("measured", spans)).deviations]
    assert names == [f"{layer}AF0" for layer in range(14, 4, -1)]


def test_a_deviation_of_less_than_a_thousandth_is_none() -> None:
    found = []
    for factor in (1.0009, 1.0011, 0.9991, 0.9989):
        slower = [span._replace(end=span.start + factor * (span.end - span.start)) for span in PREDICTED.spans[:1]]
        found.append(len(compare(PREDICTED, Trace("measured", slower)).deviations))
    assert found == [0, 1, 0, 1]


def test_busy_shares_of_both(comparison: Comparison) -> None:
    assert comparison.busy[0].share.predicted == pytest.approx(2.0 / 4.0)
    total = 5.5 + 12.0 + 5.1
    assert comparison.busy[0].share.measured == pytest.approx((2.5 + 10.0 + 2.1) / total)
    assert [row.rank for row in comparison.busy] == [0, 1]


def test_a_trace_equals_itself() -> None:
    same = compare(PREDICTED, PREDICTED)
    assert same.iteration.ratio == 1.0
    assert same.deviations == []
    assert same.busy[0] == BusyRow(0, Pair(0.5, 0.5))


def test_traces_without_a_common_task_are_refused() -> None:
    other = Trace("measured", [Span(0, "compute", "7AF0", 0.0, 1.0)])
    with pytest.raises(UserError, match="no task in common"):
        compare(PREDICTED, other)


def test_tables(comparison: Comparison) -> None:
    output = io.StringIO()
    Console(file=output, width=140).print(render(comparison))
    lines = output.getvalue().splitlines()
    assert lines[0] == "measured 5.500 s an iteration (median of 3 steps), simulated 4.000 s: ratio 1.375"
    assert lines[1] == "tasks in one trace only: 1 simulated, 1 measured"
    rows = [" ".join(line.split()) for line in lines]
    assert "attention forward 2 2.000 s 2.500 s 1.250 1.000 s 1.250 s 1.250" in rows
    assert "optimizer 1 - 500.0 ms - - 500.0 ms -" in rows
    assert "1 compute 0EF0 2.000 s 3.000 s 1.500" in rows
    assert "0 50.0% 64.6%" in rows


def test_json(comparison: Comparison) -> None:
    data = json.loads(json.dumps(comparison.as_dict()))
    assert data["ratio"] == 1.375
    assert data["iteration"] == {"predicted": 4.0, "measured": 5.5}
    assert data["deviations"][0]["name"] == "0EF0"
