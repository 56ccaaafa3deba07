"""Gradients of a fully sharded dense part: a rank keeps its share of their sums."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hetermoe_cli.runtime.modules.shards import Segment


class GradientShares:
    """A segment's gradients are whole from its backward in a window until they are summed: autograd accumulates the
    window's micro-batches in gradients of its own, fp32 or wider, which `collect` rounds once to `exchange`. Several
    windows add up in the shares: what a rank has of those before goes into the next sum. `counted`: whether the norm
    counts them, which it does in one group."""

    def __init__(self, segments: Sequence[Segment], exchange: torch.dtype, counted: bool = True) -> None:
        self._segments, self.counted = segments, counted
        self.shares = [torch.zeros_like(segment.weights, dtype=exchange) for segment in segments]
        for parameter in self._parameters():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            if parameter.dtype != wide:
                parameter.grad_dtype = wide

    def _parameters(self) -> Iterator[nn.Parameter]:
        for segment in self._segments:
            yield from segment.parameters

    def zero(self) -> None:
        """Start a new iteration."""
        for share in self.shares:
            share.zero_()
        for parameter in self._parameters():
            parameter.grad = None  # what an iteration that failed may have left

    def collect(self, layer: int) -> Tensor:
        """[ranks * n] whole gradients of a segment, which are kept nowhere else any more."""
        segment = self._segments[layer]
        flat = self.shares[layer].new_zeros(segment.share * segment.count)
        for parameter, place in zip(segment.parameters, segment.split(flat), strict=True):
            if parameter.grad is not None:
                place.copy_(parameter.grad)
                parameter.grad = None
        return flat

    def add_earlier(self, layer: int, flat: Tensor) -> Tensor:
        """Put this rank's share of the windows before into `flat` [ranks * n], which is to be summed; without padding,
        as it is in every group."""
        segment = self._segments[layer]
        segment.share_of(flat).add_(self.shares[layer])
        return flat[: segment.size]

    def keep(self, layer: int, flat: Tensor) -> Tensor:
        """This rank's share of `flat` [ranks * n], which is summed."""
        return self.shares[layer].copy_(self._segments[layer].share_of(flat))

    def pieces(self) -> dict[Tensor, Tensor]:
        """What the optimizer steps of the dense part, with its gradient."""
        result: dict[Tensor, Tensor] = {}
        for segment, share in zip(self._segments, self.shares, strict=True):
            offset = 0
            for piece in segment.pieces:
                if piece:
                    result[piece.weight] = share[offset : offset + len(piece.weight)]
                    offset += len(piece.weight)
        return result
