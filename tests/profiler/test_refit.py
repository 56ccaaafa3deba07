"""Fits of measured against predicted seconds, and kernel tables that follow them."""

import subprocess
import sys

import pytest

from builders import make_model, make_profile
from hetermoe_cli.profiler.refit import KINDS, Fit, Sample, fit, point_sizes, refit

POINTS = (16.0, 64.0, 256.0)


def samples(size: float, ratio: float, count: int = 8, seconds: float = 1.0) -> list[Sample]:
    return [Sample(size, seconds, ratio * seconds)] * count


def found(tasks: list[Sample], points: tuple[float, ...] = POINTS) -> Fit:
    one = fit(tasks, points)
    assert one is not None
    return one


def test_a_few_tasks_that_waited_for_a_core_do_not_move_the_ratio() -> None:
    one = found(samples(64, 1.5, 10) + samples(64, 40.0, 2))
    assert (one.tasks, one.ratio, one.spread, one.sizes) == (12, 1.5, 0.0, (64, 64))


def test_long_tasks_weigh_more_than_short_ones() -> None:
    assert found(samples(64, 2.0, 3) + samples(64, 9.0, 5, seconds=0.1)).ratio == 2.0


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    one = found([Sample(64, 1.0, ratio) for ratio in (1.0, 2.0, 3.0, 4.0)])
    assert (one.ratio, one.spread) == (2.0, 1.0)


def test_tasks_without_work_count_for_nothing() -> None:
    assert fit([Sample(0, 0.0, 0.001)], POINTS) is None
    assert fit([], POINTS) is None
    assert found([Sample(0, 0.0, 0.001), *samples(64, 2.0)]).tasks == 8


def test_a_backward_shorter_than_the_forward_in_it_is_no_fit() -> None:
    assert fit(samples(64, -0.1), POINTS) is None


def test_sizes_far_apart_get_ratios_of_their_own() -> None:
    one = found(samples(20, 3.0) + samples(200, 1.0))
    assert one.knots == ((16.0, 3.0), (256.0, 1.0))
    assert one.at(64) == pytest.approx(2.0)  # half way between 16 and 256 in powers
    assert (one.at(1), one.at(16), one.at(256), one.at(10**6)) == (3.0, 3.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "tasks",
    [
        samples(100, 3.0, 9) + samples(180, 1.0),  # two points are near, the sizes are not apart
        samples(20, 3.0) + samples(200, 1.0, 7),  # too few of one size
        samples(200, 3.0) + samples(20, 9.0, seconds=0.01),  # too short to matter
    ],
)
def test_one_ratio_serves_sizes_that_are_alike_or_rare(tasks: list[Sample]) -> None:
    one = found(tasks)
    assert one.knots == ()
    assert one.at(16) == one.at(256) == one.ratio == 3.0


def test_a_table_is_scaled_kind_by_kind() -> None:
    model = make_model(dense_layers=1, dense_ffn_size=96)
    table = make_profile("new", model=model, expert_seconds=0.01).tables[0]
    fits = {kind: Fit(5, 1.5 + index, 0.1 * index, (1, 1)) for index, kind in enumerate(KINDS)}
    new = refit(table, fits)
    for old_points, new_points, forward, backward in (
        (table.attention, new.attention, 1.5, 2.5),
        (table.dense, new.dense, 1.5, 2.5),
        (table.expert, new.expert, 3.5, 4.5),
        (table.head, new.head, 5.5, 5.5),
    ):
        for old, point in zip(old_points, new_points, strict=True):
            assert point.forward_seconds == pytest.approx(forward * old.forward_seconds, rel=1e-4)
            assert point.backward_seconds == pytest.approx(backward * old.backward_seconds, rel=1e-4)
            assert point.saved_bytes == old.saved_bytes
    assert new.optimizer_seconds_per_parameter == pytest.approx(6.5 * table.optimizer_seconds_per_parameter, rel=1e-4)
    assert (new.attention[0].spread, new.expert[0].spread, new.head[0].spread) == (0.1, 0.3, 0.4)


def test_kinds_that_were_not_seen_stay_as_they_are() -> None:
    table = make_profile("new").tables[0]
    assert refit(table, {}) == table
    new = refit(table, {"expert forward": Fit(5, 2.0, 0.0, (64, 64), ((16.0, 2.0), (256.0, 4.0)))})
    assert (new.attention, new.head) == (table.attention, table.head)
    assert [
        point.forward_seconds / old.forward_seconds for point, old in zip(new.expert, table.expert, strict=True)
    ] == (pytest.approx([2.0, 3.0, 4.0]))
    assert [point.backward_seconds for point in new.expert] == [point.backward_seconds for point in table.expert]


def test_sizes_of_a_tables_points() -> None:
    table = make_profile("new", sequence_lengths=(64, 128)).tables[0]
    assert point_sizes(table, "attention backward") == [1, 2, 4]
    assert point_sizes(table, "expert forward") == [16, 64, 256]
    assert point_sizes(table, "head") == [64, 256]
    assert point_sizes(table, "optimizer") == []


def test_calibration_loads_no_torch() -> None:
    code = "import sys, hetermoe_cli.report.calibration_table; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
