"""Experts: SwiGLU networks of one layer, stacked, run on rows that are sorted by expert; and the combine."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hetermoe_cli.model.grouped import group_ends, grouped_linear, has_grouped_gemm
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
        if has_grouped_gemm(rows, self.down.shape[1:]):
            return self._grouped(rows, counts)
        return self._one_by_one(rows, counts)

    def _grouped(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        ends = group_ends(counts, rows.device)
        gate, up = grouped_linear(rows, self.gate_up, ends).chunk(2, dim=-1)
        return grouped_linear(functional.silu(gate) * up, self.down, ends)

    def _one_by_one(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        # unbind, not indexing: its backward writes one stacked gradient instead of one per expert
        weights = zip(self.gate_up.unbind(), self.down.unbind(), strict=True)
        parts = [
            self._expert(part, gate_up, down)
            for part, (gate_up, down) in zip(torch.split(rows, list(counts)), weights, strict=True)
            if len(part)
        ]
        return torch.cat(parts)

    @staticmethod
    def _expert(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = functional.linear(rows, gate_up).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, down)

    def named_slices(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """(name, stacked parameter, index): `parameter[index]` is the tensor called `name` in every layout."""
        for index, expert in enumerate(self.ids):
            yield f"layers.{self.layer}.experts.{expert}.gate_up", self.gate_up, index
            yield f"layers.{self.layer}.experts.{expert}.down", self.down, index


def combine(hidden: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
    """hidden [B, S, H] plus the weighted expert outputs [T, k, H], weights [T, k]."""
    mixed = (weights.unsqueeze(-1) * outputs).sum(dim=1)
    return hidden + mixed.view_as(hidden)
