"""Processes of one machine find each other, and sum through shared memory; where one cannot, none does."""

import operator
import os
from functools import reduce
from typing import Any

import numpy as np
import pytest
from workers import run_workers

from builders import make_layout


def start(rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")


def exchange(rank: int, copies: list[list[int]]) -> Any:
    import torch

    from hetermoe_cli.runtime.machine.neighbours import connect

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
    from hetermoe_cli.runtime.machine.neighbours import connect

    start(rank)
    if how == "another node":
        os.environ["GROUP_RANK"] = str(int(rank == 1))
    return len(connect([0, 1, 2], 2, shares=how == "another node" or rank != 1))


@pytest.mark.parametrize("how", ["another node", "does not share"])
def test_none_shares_where_one_cannot(how: str) -> None:
    assert run_workers(3, reluctant, how) == [0, 0, 0]


def add(rank: int, members: list[int], sizes: list[int]) -> list[Any]:
    import torch

    from hetermoe_cli.runtime.machine.local_sum import all_reduce
    from hetermoe_cli.runtime.machine.neighbours import connect

    start(rank)
    (mail,) = connect([0, 1, 2], 1, shares=True)
    tensors = [torch.from_numpy(addend(rank, size)) for size in sizes]
    for tensor in tensors:
        if rank in members:
            all_reduce(mail, tensor, members, rank)
    return [tensor.numpy() for tensor in tensors]


def scatter_and_gather(rank: int, members: list[int], sizes: list[int]) -> list[Any]:
    import torch

    from hetermoe_cli.runtime.machine.local_sum import all_gather, reduce_scatter
    from hetermoe_cli.runtime.machine.neighbours import connect

    start(rank)
    (mail,) = connect([0, 1, 2], 1, shares=True)
    result = []
    for size in sizes if rank in members else ():
        tensor = torch.from_numpy(addend(rank, size))
        share = -(-size // len(members))
        reduce_scatter(mail, tensor, members, rank, share)
        place = members.index(rank) * share
        own = torch.zeros(share)
        own[: len(tensor[place : place + share])] = tensor[place : place + share]
        everyone = torch.empty(share * len(members))
        all_gather(mail, everyone, own, members, rank)
        result.append(everyone[:size].numpy())
    return result


@pytest.mark.parametrize("members", [[0, 1, 2], [0, 2]])
def test_shares_of_sums_are_those_of_whole_sums(members: list[int]) -> None:
    """Of any size, each rank's share in its place: told to all, they are the whole sum, to the bit."""
    sizes = [1, 2, 3, 5000, 800_000, 4]
    found = run_workers(3, scatter_and_gather, members, sizes)
    for number, size in enumerate(sizes):
        wanted = in_order(members, size)
        for rank in members:
            np.testing.assert_array_equal(found[rank][number], wanted)


def scatter(rank: int, sizes: list[int], dtype: str) -> list[Any]:
    import torch

    from hetermoe_cli.runtime.machine.mesh import join

    mesh, result = join(make_layout((1, 1, 1), (1, 1, 1)), "cpu", shares=False), []
    for size in sizes:
        tensor, share = torch.from_numpy(addend(rank, size)).to(getattr(torch, dtype)), -(-size // 3)
        mesh.reduce_scatter(tensor, share, mesh.shared[0, 1, 2])
        result.append(tensor[rank * share :][:share].float().numpy())
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gloo_scatters_sums(dtype: str) -> None:
    sizes = [1, 2, 3, 5000, 100_001]
    found = run_workers(3, scatter, sizes, dtype)
    for number, size in enumerate(sizes):
        wanted = sum(addend(rank, size) for rank in range(3))
        tolerance = {"float32": 1e-6, "bfloat16": 2**-5, "float16": 2**-8}[dtype]  # addends are rounded, of up to 5
        np.testing.assert_allclose(np.concatenate([f[number] for f in found]), wanted, atol=tolerance, rtol=tolerance)


def in_order(members: list[int], size: int) -> Any:
    """The sum of what members add, in their order."""
    return reduce(operator.add, [addend(member, size) for member in members])


def addend(rank: int, size: int) -> Any:
    return np.random.default_rng([rank, size]).standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("members", [[0, 1, 2], [0, 2]])
def test_sums_have_the_same_bits_everywhere(members: list[int]) -> None:
    sizes = [1, 2, 3, 5000, 300_000, 4]
    found = run_workers(3, add, members, sizes)
    for number, size in enumerate(sizes):
        wanted = in_order(members, size)
        for rank in range(3):
            expected = wanted if rank in members else addend(rank, size)
            np.testing.assert_array_equal(found[rank][number], expected)
