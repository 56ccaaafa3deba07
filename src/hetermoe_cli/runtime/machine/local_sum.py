"""Sums over processes that share memory: every one adds up its part of the tensor and shows it to those who need it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hetermoe_cli.runtime.machine.neighbours import Mail

PIECE_BYTES = 2**20  # at once: it stays in the cache, and rooms stay small


def all_reduce(mail: Mail, tensor: Tensor, ranks: Sequence[int], me: int) -> None:
    """Sum a contiguous host tensor over `ranks`, in place and in their order, so that all get the same bits.

    Collective over `ranks`, of which `me` is one. PeerLost if one is gone.
    """
    for piece in torch.split(tensor.view(-1), PIECE_BYTES // tensor.element_size()):
        parts = dict(zip(ranks, piece.tensor_split(len(ranks)), strict=True))
        _sum(mail, parts, me)
        _tell(mail, parts, me)


def reduce_scatter(mail: Mail, tensor: Tensor, ranks: Sequence[int], me: int, share: int) -> None:
    """The same of this rank's part alone, one of `share` elements for each rank in turn (the last may have fewer)."""
    flat = tensor.view(-1)
    parts = {rank: flat[number * share : (number + 1) * share] for number, rank in enumerate(ranks)}
    step = max(1, PIECE_BYTES // tensor.element_size() // len(ranks))
    for start in range(0, share, step):
        _sum(mail, {rank: part[start : start + step] for rank, part in parts.items()}, me)


def all_gather(mail: Mail, everyone: Tensor, own: Tensor, ranks: Sequence[int], me: int) -> None:
    """Every rank's `own` [n] into `everyone` [ranks * n]."""
    parts = dict(zip(ranks, torch.split(everyone, len(own)), strict=True))
    step = max(1, PIECE_BYTES // own.element_size() // len(ranks))
    parts[me].copy_(own)
    for start in range(0, len(own), step):
        _tell(mail, {rank: part[start : start + step] for rank, part in parts.items()}, me)


def _sum(mail: Mail, parts: Mapping[int, Tensor], me: int) -> None:
    """Each rank's part, summed over all ranks in their order, on that rank."""
    others = [rank for rank, part in parts.items() if rank != me and len(part)]
    for rank in others:
        mail.show(rank, mail.room(parts[rank]).copy_(parts[rank]))
    mine = parts[me]
    if not len(mine):
        return
    addends = [mine if rank == me else mail.shown(rank, mine) for rank in parts]
    first = [*parts][:2]
    total = torch.add(*addends[:2], out=mine if me in first else None)
    for addend in addends[2:]:
        total += addend
    if me not in first:
        mine.copy_(total)


def _tell(mail: Mail, parts: Mapping[int, Tensor], me: int) -> None:
    """This rank's part to all others, and theirs here."""
    others = [rank for rank in parts if rank != me]
    if len(parts[me]):
        room = mail.room(parts[me]).copy_(parts[me])
        for rank in others:
            mail.show(rank, room)
        del room
    for rank in others:
        if len(parts[rank]):
            parts[rank].copy_(mail.shown(rank, parts[rank]))
