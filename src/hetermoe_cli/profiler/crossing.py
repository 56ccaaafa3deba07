"""What the engine does to rows where they enter and leave a stage, as part of what is timed.

Rows come and go in the order of messages: by target rank or by source, not by token or expert. Here that order is a
random one, and what is read and written beside the stage's own tensors is scratch memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hetermoe_cli.runtime.transfers.dispatcher import Arrivals
from hetermoe_cli.runtime.transfers.slots import Slots, tail_size


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
        self._slots = Slots(torch.randperm(tokens * top_k, device=device), top_k)

    def arrive(self, hidden: Tensor) -> Tensor:
        """hidden [B, S, H], what a stage reads: sum the outputs that come; spread its gradient."""
        rows, slots = hidden.flatten(0, 1), self._slots
        return _across(
            lambda _: slots.summed(self._scratch(rows)).add_(rows),
            lambda gradient: slots.gather(gradient.flatten(0, 1)),
            hidden,
        )[0]

    def depart(self, rows: Tensor, weights: Tensor) -> Sequence[Tensor]:
        """rows [T, H] and weights [T, k] to dispatch: spread them; sum the gradients that come."""
        width, more, slots = rows.shape[1], tail_size(rows.dtype), self._slots

        def back(given: Tensor, _: Tensor) -> None:
            wide = self._scratch(given, more)
            slots.summed(wide)[:, :width].contiguous()
            slots.to_tokens(wide[:, width, None])

        return _across(lambda r, w: slots.gather_weighted(r, w, self._scratch(r, more)), back, rows, weights)

    def _scratch(self, like: Tensor, more: int = 0) -> Tensor:
        return like.new_empty(len(self._slots.order), like.shape[1] + more)


class ExpertSide:
    """M rows on a rank that hosts: by source outside, by expert inside."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._arrivals = Arrivals(torch.randperm(rows, device=device), [rows], [rows])

    def arrive(self, rows: Tensor, weights: Tensor) -> Sequence[Tensor]:
        """rows [M, H] and weights [M] are grouped; their gradients ungrouped."""
        width, arrivals = rows.shape[1], self._arrivals

        def forth(rows: Tensor, _: Tensor) -> None:
            wide = self._scratch(rows)
            arrivals.group(wide[:, :width])
            arrivals.group(wide[:, width])

        return _across(forth, lambda r, w: arrivals.ungroup_weighted(r, w, self._scratch(r)), rows, weights)

    def depart(self, outputs: Tensor) -> Tensor:
        """outputs [M, H] are ungrouped; their gradient grouped."""
        return _across(self._arrivals.ungroup, self._arrivals.group, outputs)[0]

    def _scratch(self, like: Tensor) -> Tensor:
        return like.new_empty(len(like), like.shape[1] + tail_size(like.dtype))
