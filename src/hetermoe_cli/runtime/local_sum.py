"""Sums over processes that share memory: every one adds up its part of the tensor and shows it to the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hetermoe_cli.runtime.neighbours import Mail

PIECE_BYTES = 2**20  # at once: it stays in the cache, and rooms stay small


def all_reduce(mail: Mail, tensor: Tensor, ranks: Sequence[int], me: int) -> None:
    """Sum a contiguous host tensor over `ranks`, in place and in their order, so that all get the same bits.

    Collective over `ranks`, of which `me` is one. PeerLost if one is gone.
    """
    for piece in torch.split(tensor.view(-1), PIECE_BYTES // tensor.element_size()):
        _sum(mail, piece, ranks, me)


def _sum(mail: Mail, piece: Tensor, ranks: Sequence[int], me: int) -> None:
    others = [rank for rank in ranks if rank != me]
    parts, copies = (dict(zip(ranks, one.tensor_split(len(ranks)), strict=True)) for one in (piece, mail.room(piece)))
    for rank in others:
        mail.show(rank, copies[rank].copy_(parts[rank]))
    copies.clear()
    addends = {rank: mail.shown(rank, parts[me]) for rank in others} | {me: parts[me]}
    total = mail.room(parts[me])
    torch.add(addends[ranks[0]], addends[ranks[1]], out=total)
    for rank in ranks[2:]:
        total += addends[rank]
    addends.clear()
    for rank in others:
        mail.show(rank, total)
    parts[me].copy_(total)
    for rank in others:
        parts[rank].copy_(mail.shown(rank, parts[rank]))
