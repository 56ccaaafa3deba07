"""Stages: the model cut at every border between attention and experts, each with its own small autograd graph.

A stage's inputs are detached leaves, so its backward stops at its border and nothing is propagated twice
(the paper's "stop at the attention outputs"). With recompute a stage keeps its inputs and reruns in backward.

Experts weight their outputs, so that an attending rank only sums those of a token (k of them) and keeps none: the
gradient of the sum is that of each, and what a weight's gradient needs is at hand where the expert runs backward.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hetermoe_cli.model.kernels.documents import Documents
from hetermoe_cli.model.layers.attention import Routed
from hetermoe_cli.model.layers.moe import ExpertGroup
from hetermoe_cli.model.seed import Seed
from hetermoe_cli.model.transformer import DenseModel


@dataclass
class AttentionStage:
    """One attention stage of one micro-batch: what it reads, and its outputs while the graph lives."""

    inputs: Tensor  # [B, S, H], a leaf; tokens [B, S] for the first layer
    routed: Routed | None
    run: Callable[[], Routed]
    kept: bool

    @classmethod
    def forward(
        cls, dense: DenseModel, layer: int, inputs: Tensor, recompute: bool, documents: Documents | None = None
    ) -> "AttentionStage":
        """Run the stage; grad mode decides whether a graph is built."""

        def run() -> Routed:
            return dense.stage(layer, inputs if layer else dense.embed(inputs, documents), documents)

        kept = torch.is_grad_enabled() and not recompute
        with torch.set_grad_enabled(kept):
            routed = run()
        return cls(inputs, routed, run, kept)

    def outputs(self) -> Routed:
        """What the stage computed."""
        assert self.routed is not None
        return self.routed

    def again(self) -> tuple[Tensor, Tensor]:
        """Run a stage that was not kept once more, for backward; rows [T, H] and weights [T, k] to send again."""
        self.routed, self.kept = self.run(), True
        return self.take_rows()

    def take_rows(self) -> tuple[Tensor, Tensor]:
        """Rows [T, H] to dispatch and their combine weights [T, k]; not kept where backward does not need them."""
        rows, weights = self.outputs().rows.detach(), self.outputs().weights.detach()
        if not self.kept:
            none = rows.new_empty(0)
            self.routed = self.outputs()._replace(rows=none, weights=none)
        return rows, weights

    def combined(self, outputs: Tensor) -> Tensor:
        """What the next stage reads, a leaf [B, S, H]: the residual plus the sum of each token's `outputs` [T, H],
        which come weighted. In their place."""
        hidden = self.outputs().hidden.detach()
        if not self.kept:
            self.routed = None
        return outputs.view_as(hidden).add_(hidden).requires_grad_(torch.is_grad_enabled())

    def backward(self, hidden: Tensor, rows: Tensor, weights: Tensor, loss_scale: float) -> Tensor | None:
        """Propagate the gradients of routed.hidden, .rows and .weights, and `loss_scale` into the gate's own losses.

        Returns the gradient of what the stage read [B, S, H], None for the first layer.
        """
        routed = self.outputs() if self.kept else self.run()
        outputs, gradients = [routed.hidden, routed.rows, routed.weights], [hidden, rows, weights]
        if routed.losses is not None:
            outputs.append(routed.losses)
            gradients.append(torch.full_like(routed.losses, loss_scale))
        Seed(outputs).backward(gradients)
        return self.inputs.grad


class ExpertParts(nn.Module):
    """One layer's experts on one rank: hosted ones, then replicated ones (kept apart: only these are all-reduced)."""

    def __init__(self, hosted: ExpertGroup, replicated: ExpertGroup) -> None:
        super().__init__()
        self.hosted, self.replicated = hosted, replicated

    def forward(self, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        """rows [M, H] grouped by local expert, each with one of `weights` [M] -> outputs [M, H], weighted."""
        border = len(self.hosted.ids)
        split = sum(counts[:border])
        if not self.replicated.ids:
            return self.hosted(rows, counts, weights)  # type: ignore[no-any-return]
        first = self.hosted(rows[:split], counts[:border], weights[:split])
        return torch.cat([first, self.replicated(rows[split:], counts[border:], weights[split:])])


@dataclass
class ExpertStage:
    """One expert stage of one micro-batch. Of a graph that is kept only the end is held, not its values."""

    rows: Tensor
    weights: Tensor
    outputs: Tensor | None
    run: Callable[[], Tensor]
    end: Seed | None

    @classmethod
    def forward(
        cls, parts: ExpertParts, rows: Tensor, weights: Tensor, counts: list[int], recompute: bool
    ) -> "ExpertStage":
        """rows [M, H] grouped by expert, with their combine weights [M]."""
        rows, weights = (leaf.detach().requires_grad_(torch.is_grad_enabled()) for leaf in (rows, weights))

        def run() -> Tensor:
            return parts(rows, weights, counts)  # type: ignore[no-any-return]

        kept = torch.is_grad_enabled() and not recompute
        with torch.set_grad_enabled(kept):
            outputs = run()
        end = Seed([outputs]) if kept and len(rows) else None
        return cls(rows, weights, outputs.detach(), run, end)

    def take_outputs(self) -> Tensor:
        """Weighted outputs [M, H] to combine; not kept, for backward does not need them."""
        assert self.outputs is not None
        outputs, self.outputs = self.outputs, None
        return outputs

    def backward(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the outputs [M, H] -> gradients of rows [M, H] and weights [M]."""
        if not len(self.rows):
            return gradient, self.weights
        (self.end or Seed([self.run()])).backward([gradient])
        assert self.rows.grad is not None
        assert self.weights.grad is not None
        return self.rows.grad, self.weights.grad
