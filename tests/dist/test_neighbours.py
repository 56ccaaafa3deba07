"""Processes of one machine find each other, and sum through shared memory; where one cannot, none does."""

import os
from typing import Any

import numpy as np
import pytest
from workers import run_workers


def start(rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")


def exchange(rank: int, copies: list[list[int]]) -> Any:
    import torch

    from hetermoe_cli.runtime.neighbours import connect

    start(rank)
    processes = next(copy for copy in copies if rank in copy)
    mail, me = connect(processes, 2, shares=True), processes.index(rank)
    for direction, one in enumerate(mail):
        for peer in one.inboxes:
            rows = one.outbox.room(8).view(torch.int64).fill_(100 * direction + 10 * me + peer)
            one.outbox.send(peer, one.outbox.place(rows), 8, b"", 0.0, 0.0)
    found = [{peer: box.receive().rows.view(torch.int64).item() for peer, box in one.inboxes.items()} for one in mail]
    torch.distributed.barrier()  # who still sends must not find a peer gone
    return found


@pytest.mark.parametrize("copies", [[[0, 1, 2]], [[0, 2], [1, 3]], [[1], [0, 2]]])
def test_every_rank_hears_every_other_of_its_copy_in_both_directions(copies: list[list[int]]) -> None:
    found = run_workers(sum(map(len, copies)), exchange, copies)
    for copy in copies:
        for me, process in enumerate(copy):
            others = [rank for rank in range(len(copy)) if rank != me]
            wanted = [{peer: 100 * direction + 10 * peer + me for peer in others} for direction in (0, 1)]
            assert found[process] == wanted


def reluctant(rank: int, how: str) -> int:
    from hetermoe_cli.runtime.neighbours import connect

    start(rank)
    if how == "another node":
        os.environ["GROUP_RANK"] = str(int(rank == 1))
    return len(connect([0, 1, 2], 2, shares=how == "another node" or rank != 1))


@pytest.mark.parametrize("how", ["another node", "does not share"])
def test_none_shares_where_one_cannot(how: str) -> None:
    assert run_workers(3, reluctant, how) == [0, 0, 0]


def add(rank: int, members: list[int], sizes: list[int]) -> list[Any]:
    import torch

    from hetermoe_cli.runtime.local_sum import all_reduce
    from hetermoe_cli.runtime.neighbours import connect

    start(rank)
    (mail,) = connect([0, 1, 2], 1, shares=True)
    tensors = [torch.from_numpy(addend(rank, size)) for size in sizes]
    for tensor in tensors:
        if rank in members:
            all_reduce(mail, tensor, members, rank)
    return [tensor.numpy() for tensor in tensors]


def addend(rank: int, size: int) -> Any:
    return np.random.default_rng([rank, size]).standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("members", [[0, 1, 2], [0, 2]])
def test_sums_have_the_same_bits_everywhere(members: list[int]) -> None:
    sizes = [1, 2, 3, 5000, 300_000, 4]
    found = run_workers(3, add, members, sizes)
    for number, size in enumerate(sizes):
        wanted = addend(members[0], size)
        for member in members[1:]:
            wanted = wanted + addend(member, size)
        for rank in range(3):
            expected = wanted if rank in members else addend(rank, size)
            np.testing.assert_array_equal(found[rank][number], expected)
