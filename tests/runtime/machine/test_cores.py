"""Workers that need all cores of a node have some of their own."""

import os

import pytest

from hetermoe_cli.runtime.machine.cores import bind, own_cores


def test_all_cores_are_dealt_out() -> None:
    assert [own_cores({0, 1, 4, 5, 6, 7}, worker, 3, 2) for worker in range(3)] == [{0, 1}, {4, 5}, {6, 7}]


@pytest.mark.parametrize(("workers", "threads"), [(1, 2), (2, 1), (3, 2), (5, 1)])
def test_any_core_where_some_are_left_or_too_few(workers: int, threads: int) -> None:
    assert own_cores({2, 3, 8, 9}, 0, workers, threads) == {2, 3, 8, 9}


def test_this_process_is_bound_by_its_place_on_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: bound.append(cores))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    bind(threads=1)
    bind(threads=2)
    assert bound == [{5}, {3, 5}]
