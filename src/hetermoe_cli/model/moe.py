"""Experts: SwiGLU networks of one layer, stacked, run on rows that are sorted by expert; and the combine."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hetermoe_cli.model.grouped import has_grouped_gemm, run_experts
from hetermoe_cli.spec.model import ModelConfig


class ExpertGroup(nn.Module):
    """The experts of one layer that one rank holds, in the order of `ids`."""

    def __init__(self, config: ModelConfig, layer: int, ids: Sequence[int]) -> None:
        super().__init__()
        self.layer, self.ids = layer, list(ids)
        self.gate_up = nn.Parameter(torch.empty(len(ids), 2 * config.ffn_size, config.hidden_size))
        self.down = nn.Parameter(torch.empty(len(ids), config.hidden_size, config.ffn_size))

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """rows [T, H], the first counts[0] for the first expert and so on -> outputs [T, H]."""
        if not len(rows):
            return rows
        return run_experts(rows, self.gate_up, self.down, counts, has_grouped_gemm(rows, self.down.shape[1:]))

    def named_slices(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """(name, stacked parameter, index): `parameter[index]` is the tensor called `name` in every layout."""
        for index, expert in enumerate(self.ids):
            yield f"layers.{self.layer}.experts.{expert}.gate_up", self.gate_up, index
            yield f"layers.{self.layer}.experts.{expert}.down", self.down, index


def combine(hidden: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
    """hidden [B, S, H] plus the weighted expert outputs [T, k, H], weights [T, k]."""
    return _Combine.apply(hidden, outputs, weights)  # type: ignore[no-any-return, no-untyped-call]


class _Combine(torch.autograd.Function):
    """Choice by choice into one tensor: no weighted outputs are written and read again, as a product and its sum would
    (2 to 3 times the time, cold, on a CPU)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(outputs, weights)
        first, *others = outputs.unbind(1)
        mixed = first * weights[:, :1]
        for choice, output in enumerate(others, 1):
            mixed.addcmul_(output, weights[:, choice, None])
        mixed += hidden.flatten(0, 1)  # last: small outputs would be lost in the residual one by one
        return mixed.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs, weights = ctx.saved_tensors
        gradient = gradients[0].flatten(0, 1).unsqueeze(1)
        return gradients[0], weights.unsqueeze(-1) * gradient, (outputs * gradient).sum(-1)
