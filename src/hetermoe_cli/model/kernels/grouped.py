"""The experts of one rank and layer as one autograd function: rows sorted by expert through each expert's SwiGLU.

It keeps the rows and the first product only; the activation is computed again in backward, which reads gate and up
anyway. Gradients of weights are written and added in the product itself where they accumulate ("gradient accumulation
fusion", Megatron-LM): none is cleared, written, read and added apart. Where they accumulate in fp32 and rows are
narrower, a CPU adds them expert by expert, so that no layer's exist twice.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hetermoe_cli.model.kernels import swiglu
from hetermoe_cli.model.kernels.row_blocks import Blocks

_ALIGNMENT_BYTES = 16  # of every row, for torch's grouped_mm
_PLACE = "_hetermoe_gradient_place"
_CUDA_MAJORS = (9, 10)  # compute capabilities with a grouped kernel; it takes bf16 only


def has_grouped_gemm(rows: Tensor, widths: Sequence[int]) -> bool:
    """Whether one call for all experts is right for rows like these, times matrices of these widths.

    On a CPU a loop over experts takes 0.94 to 1.06 of its time where they have many rows each or there is one, 1.1 to
    1.5 with 24 experts of 10 to 20 rows. On CUDA cards without the kernel it is a loop that copies the counts back from
    the device: worse than our own. None has fp64.
    """
    if any(width * rows.element_size() % _ALIGNMENT_BYTES for width in widths):
        return False
    if rows.is_cuda:
        return rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device)[0] in _CUDA_MAJORS
    return rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)


def run_experts(
    rows: Tensor,
    gate_up: nn.Parameter,
    down: nn.Parameter,
    counts: Sequence[int],
    grouped: bool,
    weights: Tensor | None = None,
) -> Tensor:
    """rows [M, H], the first counts[0] for the first expert and so on, through gate_up [E, 2 F, H] and down [E, H, F]
    -> [M, H], each row times its combine weight if there are `weights` [M]; `grouped`: in one call each where the rows
    allow it, else in a loop.

    Backward puts gradients of weights into their `grad`, or where there is none yet the place that it was given
    (`give_place`), if that has the rows' precision or, on a CPU, a wider one (`grad_dtype`); others get theirs from
    autograd.
    """
    if grouped and rows.stride(0) * rows.element_size() % _ALIGNMENT_BYTES:
        rows = rows.contiguous()
    blocks = Blocks(rows, counts)
    groups = Groups(blocks.sizes, _group_ends(blocks.sizes, rows.device) if grouped else None)
    column = None if weights is None else weights[:, None]
    return _Experts.apply(rows, column, gate_up, down, groups, blocks)  # type: ignore[no-any-return, no-untyped-call]


def _group_ends(counts: Sequence[int], device: torch.device) -> Tensor:
    """[E] int32: where each expert's rows end. The device does not wait for the host, nor the host for it."""
    ends = torch.tensor(counts, dtype=torch.int64).cumsum(0).int()
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends


class Groups:
    """Rows of each expert, on the host, and where they end for grouped products."""

    def __init__(self, counts: Sequence[int], ends: Tensor | None) -> None:
        self._counts, self._ends = list(counts), ends

    def times(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """rows [M, I] times each expert's own part of matrices [E, I, O] -> [M, O]."""
        if self._ends is not None:
            return functional.grouped_mm(rows, matrices, offs=self._ends)
        result = rows.new_empty(len(rows), matrices.shape[2])
        for expert, part, out in self._each(rows, result):
            torch.mm(part, matrices[expert], out=out)
        return result

    def to_weight(self, weight: Tensor, gradient: Tensor, rows: Tensor) -> Tensor | None:
        """The gradient of weight [E, O, I] from that of rows' products [M, O] and rows [M, I]; None if it was written
        or added to `weight.grad`."""
        place, first = _place(weight, rows), weight.grad is None
        if place is None:
            return self._new_gradient(weight, gradient, rows)
        weight.grad = place
        parts = zip(place, torch.split(gradient, self._counts), torch.split(rows, self._counts), strict=True)
        for found, given, part in parts:
            if not len(part):
                if first:
                    found.zero_()
            elif found.dtype == rows.dtype:
                torch.addmm(found, given.T, part, beta=0 if first else 1, out=found)
            elif first:
                found.copy_(torch.mm(given.T, part))
            else:
                found.add_(torch.mm(given.T, part))
        return None

    def _new_gradient(self, weight: Tensor, gradient: Tensor, rows: Tensor) -> Tensor:
        if self._ends is not None:
            return functional.grouped_mm(gradient.T, rows, offs=self._ends)
        result = torch.zeros_like(weight)
        for expert, given, part in self._each(gradient, rows):
            torch.mm(given.T, part, out=result[expert])
        return result

    def _each(self, first: Tensor, second: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Experts that have rows, with their part of both."""
        parts = zip(torch.split(first, self._counts), torch.split(second, self._counts), strict=True)
        return ((expert, one, other) for expert, (one, other) in enumerate(parts) if len(one))


def give_place(weight: nn.Parameter, place: Tensor | None) -> None:
    """Where `run_experts` writes the first gradient of a weight that has none, and adds others: nobody has to clear it
    before."""
    setattr(weight, _PLACE, place)


def _place(weight: Tensor, rows: Tensor) -> Tensor | None:
    """Where the gradient of `weight` is put by hand; None where autograd is to do it, as a hook waits for a narrow
    one."""
    wide = weight.grad_dtype not in (None, rows.dtype)
    if wide and (rows.is_cuda or weight._backward_hooks):
        return None
    place: Tensor | None = getattr(weight, _PLACE, None) if weight.grad is None else weight.grad
    if place is None and wide:
        return torch.empty_like(weight, dtype=weight.grad_dtype)
    return place if place is not None and (wide or place.dtype == rows.dtype) else None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor | None, gate_up: Tensor, down: Tensor, groups: Groups, blocks: Blocks
    ) -> Tensor:
        joined = groups.times(blocks.pack(rows), gate_up.transpose(1, 2))
        # rows and weights as they came: whoever gave them keeps them anyway
        ctx.save_for_backward(rows, weights, joined, gate_up, down)
        ctx.groups, ctx.blocks = groups, blocks
        activated = swiglu.activated(joined, None if weights is None else blocks.pack(weights))
        return blocks.unpack(groups.times(activated, down.transpose(1, 2)))

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None, None]:
        rows, weights, joined, gate_up, down = ctx.saved_tensors
        groups, blocks = ctx.groups, ctx.blocks
        gradient = gradients[0].contiguous()  # grouped_mm refuses expanded ones, as that of a sum
        rows, gradient = blocks.pack(rows), blocks.pack(gradient)
        activated, to_joined = groups.times(gradient, down), torch.empty_like(joined)
        to_weights = None  # below, from its gradient to the activation
        if weights is None:
            swiglu.backward(joined, activated, to_joined, activated)
        else:
            packed = blocks.pack(weights)
            to_weights = blocks.unpack(swiglu.weighted_backward(joined, packed, activated, to_joined, activated))
        to_down = groups.to_weight(down, gradient, activated)
        del activated
        to_gate_up = groups.to_weight(gate_up, to_joined, rows)
        return blocks.unpack(groups.times(to_joined, gate_up)), to_weights, to_gate_up, to_down, None, None
