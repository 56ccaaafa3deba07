"""Sums over processes that share memory: every one adds up its part of the tensor and shows it to the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hetermoe_cli.runtime.neighbours import Mail


def all_reduce(mail: Mail, tensor: Tensor, ranks: Sequence[int], me: int) -> None:
    """Sum a contiguous host tensor over `ranks`, in place and in their order, so that all get the same bits.

    Collective over `ranks`, of which `me` is one. PeerLost if one is gone.
    """
    flat, others = tensor.view(-1), [rank for rank in ranks if rank != me]
    parts, copies = (dict(zip(ranks, one.tensor_split(len(ranks)), strict=True)) for one in (flat, _room(mail, flat)))
    for rank in others:
        _show(mail, rank, copies[rank].copy_(parts[rank]))
    copies.clear()
    addends = {rank: _shown(mail, rank, parts[me]) for rank in others} | {me: parts[me]}
    total = _room(mail, parts[me])
    torch.add(addends[ranks[0]], addends[ranks[1]], out=total)
    for rank in ranks[2:]:
        total += addends[rank]
    addends.clear()
    for rank in others:
        _show(mail, rank, total)
    parts[me].copy_(total)
    for rank in others:
        parts[rank].copy_(_shown(mail, rank, parts[rank]))


def _room(mail: Mail, like: Tensor) -> Tensor:
    return mail.outbox.room(like.numel() * like.element_size()).view(like.dtype)


def _show(mail: Mail, rank: int, part: Tensor) -> None:
    mail.outbox.send(rank, mail.outbox.place(part), part.numel() * part.element_size(), b"", 0.0, 0.0)


def _shown(mail: Mail, rank: int, like: Tensor) -> Tensor:
    return mail.inboxes[rank].receive().rows.view(like.dtype)
