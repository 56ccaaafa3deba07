"""Stages: the model cut at every border between attention and experts, each with its own small autograd graph.

A stage's inputs are detached leaves, so its backward stops at its border and nothing is propagated twice
(the paper's "stop at the attention outputs"). With recompute a stage keeps its inputs and reruns in backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hetermoe_cli.model.attention import Routed
from hetermoe_cli.model.documents import Documents
from hetermoe_cli.model.moe import ExpertGroup, combine
from hetermoe_cli.model.transformer import DenseModel


class Border(NamedTuple):
    """What crosses from layer l's attention to the next stage: leaves of the next stage's graph.

    hidden [B, S, H], outputs [T, k, H] (experts' outputs in token order), weights [T, k].
    """

    hidden: Tensor
    outputs: Tensor
    weights: Tensor

    @classmethod
    def of(cls, routed: Routed, outputs: Tensor, grad: bool) -> "Border":
        """Detached leaves."""
        leaves = (routed.hidden, outputs, routed.weights)
        return cls(*(leaf.detach().requires_grad_(grad) for leaf in leaves))

    def combined(self) -> Tensor:
        """[B, S, H] residual plus weighted expert outputs."""
        return combine(self.hidden, self.outputs, self.weights)

    def take_output_gradient(self) -> Tensor:
        """Gradient of `outputs` after the next stage's backward; not kept, for it is sent at once."""
        gradient, self.outputs.grad = self.outputs.grad, None
        assert gradient is not None
        return gradient

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of `hidden` and `weights` after the next stage's backward."""
        assert self.hidden.grad is not None
        assert self.weights.grad is not None
        return self.hidden.grad, self.weights.grad


@dataclass
class AttentionStage:
    """One attention stage of one micro-batch: its way in, and its outputs while the graph lives."""

    inputs: Border | Tensor  # tokens [B, S] for the first layer
    routed: Routed | None
    run: Callable[[], Routed]
    kept: bool

    @classmethod
    def forward(
        cls, dense: DenseModel, layer: int, inputs: Border | Tensor, recompute: bool, documents: Documents | None = None
    ) -> "AttentionStage":
        """Run the stage; grad mode decides whether a graph is built."""

        def run() -> Routed:
            hidden = inputs.combined() if isinstance(inputs, Border) else dense.embed(inputs, documents)
            return dense.stage(layer, hidden, documents)

        kept = torch.is_grad_enabled() and not recompute
        with torch.set_grad_enabled(kept):
            routed = run()
        return cls(inputs, routed, run, kept)

    def outputs(self) -> Routed:
        """What the stage computed."""
        assert self.routed is not None
        return self.routed

    def take_rows(self) -> Tensor:
        """Rows [T, H] to dispatch; not kept where backward does not need them."""
        rows = self.outputs().rows.detach()
        if not self.kept:
            self.routed = self.outputs()._replace(rows=rows.new_empty(0))
        return rows

    def border_after(self, outputs: Tensor) -> Border:
        """Leaves of the next stage, from this stage's residual and weights and the experts' outputs [T, k, H]."""
        border = Border.of(self.outputs(), outputs, torch.is_grad_enabled())
        if not self.kept:
            self.routed = None
        return border

    @property
    def border(self) -> Border:
        """The border that this stage read (not of the first layer)."""
        assert isinstance(self.inputs, Border)
        return self.inputs

    def backward(self, hidden: Tensor, rows: Tensor, weights: Tensor, loss_scale: float) -> Tensor | None:
        """Propagate the gradients of routed.hidden, .rows and .weights, and `loss_scale` into the gate's own losses.

        Returns the gradient of the previous layer's expert outputs [T, k, H], None for the first layer.
        """
        routed = self.outputs() if self.kept else self.run()
        outputs, gradients = [routed.hidden, routed.rows, routed.weights], [hidden, rows, weights]
        if routed.losses is not None:
            outputs.append(routed.losses)
            gradients.append(torch.full_like(routed.losses, loss_scale))
        torch.autograd.backward(outputs, gradients)
        return self.inputs.take_output_gradient() if isinstance(self.inputs, Border) else None


class ExpertParts(nn.Module):
    """One layer's experts on one rank: hosted ones, then replicated ones (kept apart: only these are all-reduced)."""

    def __init__(self, hosted: ExpertGroup, replicated: ExpertGroup) -> None:
        super().__init__()
        self.hosted, self.replicated = hosted, replicated

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """rows [M, H] grouped by local expert -> outputs [M, H]."""
        border = len(self.hosted.ids)
        split = sum(counts[:border])
        if not self.replicated.ids:
            return self.hosted(rows, counts)  # type: ignore[no-any-return]
        first, second = rows[:split], rows[split:]
        return torch.cat([self.hosted(first, counts[:border]), self.replicated(second, counts[border:])])


@dataclass
class ExpertStage:
    """One expert stage of one micro-batch. Of a graph that is kept only the end is held, not its values."""

    rows: Tensor
    outputs: Tensor | None
    run: Callable[[], Tensor]
    end: GradientEdge | None

    @classmethod
    def forward(cls, parts: ExpertParts, rows: Tensor, counts: list[int], recompute: bool) -> "ExpertStage":
        """rows [M, H] grouped by expert."""
        leaf = rows.detach().requires_grad_(torch.is_grad_enabled())

        def run() -> Tensor:
            return parts(leaf, counts)  # type: ignore[no-any-return]

        kept = torch.is_grad_enabled() and not recompute
        with torch.set_grad_enabled(kept):
            outputs = run()
        return cls(leaf, outputs.detach(), run, get_gradient_edge(outputs) if kept and len(leaf) else None)

    def take_outputs(self) -> Tensor:
        """Outputs [M, H] to combine; not kept, for backward does not need them."""
        assert self.outputs is not None
        outputs, self.outputs = self.outputs, None
        return outputs

    def backward(self, gradient: Tensor) -> Tensor:
        """Gradient of the outputs [M, H] -> gradient of the rows [M, H]."""
        if not len(self.rows):
            return gradient
        torch.autograd.backward(self.end or self.run(), gradient)
        assert self.rows.grad is not None
        return self.rows.grad
