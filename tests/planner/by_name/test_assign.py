"""One layer's assignment against brute force: bounds of longest-first, exactness of the MILP, room and counts kept."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetermoe_cli.planner.arrays import FloatArray, IntArray
from hetermoe_cli.planner.by_name.assign import LayerWork, assign, changes, longest_first, swapped
from hetermoe_cli.planner.solver import SolverOptions

SOLVER = SolverOptions(time_limit=10.0, relative_gap=1e-6)


def make_work(seconds: FloatArray, **other: object) -> LayerWork:
    """[ranks, experts] seconds; an expert takes one byte, room and counts do not bind unless given."""
    world, experts = seconds.shape
    fields = {
        "offset": np.zeros(world),
        "size": np.ones_like(seconds),
        "room": np.full(world, np.inf),
        "most": np.full(world, experts),
        **other,
    }
    return LayerWork(seconds, **fields)  # type: ignore[arg-type]


def optimum(work: LayerWork) -> float:
    """Lowest peak of all assignments that fit; infinite where none does."""
    world, experts = work.seconds.shape
    return min(
        (work.peak(hosts) for hosts in map(np.array, product(range(world), repeat=experts)) if holds(work, hosts)),
        default=np.inf,
    )


def holds(work: LayerWork, hosts: IntArray) -> bool:
    counts = np.bincount(hosts, minlength=len(work.room))
    return bool((work.used(hosts) <= work.room).all() and (counts <= work.most).all())


times = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5]), min_size=1, max_size=6)


@given(times, st.integers(2, 3))
def test_identical_ranks_within_the_bound_of_longest_first(seconds: list[float], world: int) -> None:
    work = make_work(np.tile(seconds, (world, 1)))
    hosts = assign(work)
    assert hosts is not None
    assert work.peak(hosts) <= (4 / 3 - 1 / (3 * world)) * optimum(work) + 1e-9


@st.composite
def any_work(draw: st.DrawFn) -> LayerWork:
    """Two or three ranks that differ in speed, offset, room and counts."""
    world, experts = draw(st.integers(2, 3)), draw(st.integers(1, 5))
    each = np.array(draw(st.lists(st.floats(0.0, 4.0), min_size=experts, max_size=experts)))
    speed = np.array(draw(st.lists(st.sampled_from([1.0, 2.0, 3.5]), min_size=world, max_size=world)))
    whole = st.lists(st.integers(0, 5), min_size=world, max_size=world)
    return make_work(
        np.outer(speed, each),
        offset=np.array(draw(st.lists(st.floats(-5.0, 3.0), min_size=world, max_size=world))),
        size=np.tile(draw(st.lists(st.sampled_from([1.0, 2.0]), min_size=experts, max_size=experts)), (world, 1)),
        room=np.array(draw(whole), dtype=np.float64),
        most=np.array(draw(whole)),
    )


@given(any_work())
def test_room_and_counts_are_kept_and_swaps_only_help(work: LayerWork) -> None:
    first = longest_first(work)
    if first is None:
        return
    assert holds(work, first)
    better = swapped(work, first)
    assert holds(work, better)
    assert work.peak(better) <= work.peak(first) + 1e-12


@settings(max_examples=40)
@given(any_work())
def test_milp_equals_brute_force(work: LayerWork) -> None:
    hosts = assign(work, SOLVER)
    if hosts is None:
        return
    assert holds(work, hosts)
    best, scale = optimum(work), float(work.seconds.max())
    assert best - 1e-9 <= work.peak(hosts) <= best + 1e-5 * max(scale, 1e-9)


def test_milp_beats_swaps_where_they_are_stuck() -> None:
    """8 + 8 against 7 + 4 + 3 + 2 is even; from 8 + 7 + 2 against 8 + 4 + 3 no single swap leads there."""
    work = make_work(np.tile([3.0, 7.0, 2.0, 8.0, 4.0, 8.0], (2, 1)))
    first, exact = assign(work), assign(work, SOLVER)
    assert first is not None
    assert exact is not None
    assert (work.peak(first), work.peak(exact)) == (17.0, 16.0)


def test_nothing_fits() -> None:
    assert longest_first(make_work(np.ones((2, 3)), room=np.ones(2))) is None
    assert longest_first(make_work(np.ones((2, 3)), most=np.ones(2, dtype=np.int64))) is None


@given(any_work(), st.integers(0, 2))
def test_changes_fit_and_tell_their_levels(work: LayerWork, source: int) -> None:
    hosts = longest_first(work)
    if hosts is None or source >= len(work.room):
        return
    for change in changes(work, hosts, source, 3):
        assert holds(work, change.hosts)
        differ = [rank for rank in range(len(work.room)) if ((change.hosts == rank) != (hosts == rank)).any()]
        assert len(differ) == 2
        assert source in differ
        assert change.level == pytest.approx(work.levels(change.hosts)[differ].max())
