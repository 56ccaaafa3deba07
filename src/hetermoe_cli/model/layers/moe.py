"""Experts: SwiGLU networks of one layer, stacked, run on rows that are sorted by expert."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hetermoe_cli.model.kernels.grouped import has_grouped_gemm, run_experts
from hetermoe_cli.spec.model import ModelConfig


class ExpertGroup(nn.Module):
    """The experts of one layer that one rank holds, in the order of `ids`."""

    def __init__(self, config: ModelConfig, layer: int, ids: Sequence[int]) -> None:
        super().__init__()
        self.layer, self.ids = layer, list(ids)
        self.gate_up = nn.Parameter(torch.empty(len(ids), 2 * config.ffn_size, config.hidden_size))
        self.down = nn.Parameter(torch.empty(len(ids), config.hidden_size, config.ffn_size))

    def forward(self, rows: Tensor, counts: Sequence[int], weights: Tensor | None = None) -> Tensor:
        """rows [T, H], the first counts[0] for the first expert and so on -> outputs [T, H], times `weights` [T]."""
        if not len(rows):
            return rows
        grouped = has_grouped_gemm(rows, self.down.shape[1:])
        return run_experts(rows, self.gate_up, self.down, counts, grouped, weights)

    def named_slices(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """(name, stacked parameter, index): `parameter[index]` is the tensor called `name` in every layout."""
        for index, expert in enumerate(self.ids):
            yield f"layers.{self.layer}.experts.{expert}.gate_up", self.gate_up, index
            yield f"layers.{self.layer}.experts.{expert}.down", self.down, index
