"""Seed: where a backward begins with given gradients.

torch.autograd.backward does the same, but compares their shapes through a module that loads sympy: half a second, and
35 MB, of every worker. A scalar's backward does not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Seed:
    """The end of a graph, known by `outputs` whose values it does not keep; one backward."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self._given: list[Tensor] = []  # not reached from here only: the graph has it, and must not have this object
        self._end: Tensor = _Sown.apply(self._given, *outputs)  # type: ignore[no-untyped-call]

    def backward(self, gradients: Sequence[Tensor]) -> None:
        """Propagate the gradients of the outputs, which have their shapes; nothing checks that."""
        self._given += gradients
        self._end.backward()  # type: ignore[no-untyped-call]


class _Sown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.given = given
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *ones: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple(ctx.given)
        ctx.given.clear()
        return (None, *gradients)
