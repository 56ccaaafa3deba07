"""What the engine does to rows where they enter and leave a stage, as part of what is timed.

Rows come and go in the order of messages: by target rank or by source, not by token or expert. Here that order is a
random one, and what is read and written beside the stage's own tensors is scratch memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hetermoe_cli.runtime.dispatcher import inverse, tail_size


class _Crossing(torch.autograd.Function):
    """Passes tensors on; runs `forth` on them, and `back` on their gradients."""

    @staticmethod
    def forward(ctx: Any, forth: Callable[..., object], back: Callable[..., object], *tensors: Tensor) -> Any:
        forth(*tensors)
        ctx.back = back
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.back(*gradients)
        return None, None, *gradients


def _across(forth: Callable[..., object], back: Callable[..., object], *tensors: Tensor) -> Sequence[Tensor]:
    found: Sequence[Tensor] = _Crossing.apply(forth, back, *tensors)  # type: ignore[no-untyped-call]
    return found


class TokenSide:
    """Rows of T tokens, k choices each, on a rank that attends."""

    def __init__(self, tokens: int, top_k: int, device: torch.device) -> None:
        order = torch.randperm(tokens * top_k, device=device)
        self._slots, self._tokens = order, order // top_k
        self._places = inverse(order).view(tokens, top_k)

    def arrive(self, hidden: Tensor) -> Tensor:
        """hidden [B, S, H], what a stage reads: sum the outputs that come; spread its gradient."""
        rows = hidden.flatten(0, 1)

        def forth(_: Tensor) -> None:
            functional.embedding_bag(self._places, self._scratch(rows), mode="sum").add_(rows)

        return _across(forth, lambda gradient: gradient.flatten(0, 1).index_select(0, self._tokens), hidden)[0]

    def depart(self, rows: Tensor, weights: Tensor) -> Sequence[Tensor]:
        """rows [T, H] and weights [T, k] to dispatch: spread them; sum the gradients that come."""
        width = rows.shape[1]

        def forth(rows: Tensor, weights: Tensor) -> None:
            wide = self._scratch(rows, tail_size(rows.dtype))
            torch.index_select(rows, 0, self._tokens, out=wide[:, :width])
            wide[:, width] = weights.flatten().index_select(0, self._slots)

        def back(given: Tensor, _: Tensor) -> None:
            wide = self._scratch(given, tail_size(given.dtype))
            functional.embedding_bag(self._places, wide, mode="sum")[:, :width].contiguous()
            wide[:, width].index_select(0, self._places.flatten())

        return _across(forth, back, rows, weights)

    def _scratch(self, like: Tensor, more: int = 0) -> Tensor:
        return like.new_empty(len(self._slots), like.shape[1] + more)


class ExpertSide:
    """M rows on a rank that hosts: by source outside, by expert inside."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._order = torch.randperm(rows, device=device)

    def arrive(self, rows: Tensor, weights: Tensor) -> Sequence[Tensor]:
        """rows [M, H] and weights [M] are grouped; their gradients ungrouped."""
        width, more = rows.shape[1], tail_size(rows.dtype)

        def forth(rows: Tensor, _: Tensor) -> None:
            wide = rows.new_empty(len(rows), width + more)
            wide[:, :width].index_select(0, self._order)
            wide[:, width].index_select(0, self._order)

        def back(to_rows: Tensor, to_weights: Tensor) -> None:
            wide, places = to_rows.new_empty(len(to_rows), width + more), inverse(self._order)
            torch.index_select(to_rows, 0, places, out=wide[:, :width])
            torch.index_select(to_weights, 0, places, out=wide[:, width])

        return _across(forth, back, rows, weights)

    def depart(self, outputs: Tensor) -> Tensor:
        """outputs [M, H] are ungrouped; their gradient grouped."""
        return _across(
            lambda rows: rows.index_select(0, inverse(self._order)),
            lambda gradient: gradient.index_select(0, self._order),
            outputs,
        )[0]
