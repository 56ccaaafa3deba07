"""Bundles of equal ranks over shared NICs: evener, never between unequal ranks, and undone where memory is short."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hetermoe_cli.planner.by_name.spread import spread


def test_the_two_hottest_bundles_go_to_different_nics() -> None:
    hosts = np.array([0, 1, 2, 3])
    rows = np.array([8.0, 6.0, 1.0, 1.0])
    found = spread(hosts, rows, np.ones(4), np.ones(4), ["a"] * 4, np.array([0, 0, 1, 1]))
    nic = np.array([0, 0, 1, 1])[found]
    assert np.bincount(nic, rows).tolist() == [9.0, 7.0]
    assert sorted(found.tolist()) == [0, 1, 2, 3]


def test_memory_keeps_everything_where_it_was() -> None:
    hosts, room = np.array([0, 1, 2]), np.array([3.0, 1.0, 1.0])
    size = np.array([2.0, 1.0, 1.0])
    found = spread(hosts, np.array([1.0, 9.0, 5.0]), size, room, ["a"] * 3, np.array([0, 0, 1]))
    assert (np.bincount(found, size, 3) <= room).all()
    assert found.tolist() == [0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 10), st.sampled_from([1.0, 2.0])), max_size=8))
def test_bundles_stay_together_among_equal_ranks(experts: list[tuple[int, float, float]]) -> None:
    kinds, nics, room = ["a", "a", "b", "b"], np.array([0, 0, 1, 1]), np.array([9.0, 8.0, 9.0, 7.0])
    hosts = np.array([host for host, _, _ in experts], dtype=np.int64)
    rows, size = np.array([r for _, r, _ in experts]), np.array([s for _, _, s in experts])
    found = spread(hosts, rows, size, room, kinds, nics)
    pairs = set(zip(hosts.tolist(), found.tolist(), strict=True))
    assert len(pairs) == len(set(hosts.tolist())) == len(set(found.tolist()))
    assert all(kinds[before] == kinds[after] for before, after in pairs)
    if (np.bincount(hosts, size, 4) <= room).all():
        assert (np.bincount(found, size, 4) <= room).all()
