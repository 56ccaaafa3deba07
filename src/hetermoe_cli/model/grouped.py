"""Grouped matrix products: rows sorted by expert times each expert's matrix, in one call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_ALIGNMENT_BYTES = 16  # of every row, for torch's grouped_mm
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


def group_ends(counts: Sequence[int], device: torch.device) -> Tensor:
    """[E] int32: where each expert's rows end. The device does not wait for the host, nor the host for it."""
    ends = torch.tensor(counts, dtype=torch.int64).cumsum(0).int()
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [M, I] times each expert's own part of weight [E, O, I] -> [M, O]."""
    return _GroupedLinear.apply(rows, weight, ends)  # type: ignore[no-any-return, no-untyped-call]


class _GroupedLinear(torch.autograd.Function):
    """torch's own backward refuses gradients that are expanded, as that of a sum is."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.ends = ends  # neither an input that has a gradient nor an output
        return functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (rows, weight), ends, gradient = ctx.saved_tensors, ctx.ends, gradients[0].contiguous()
        to_rows = functional.grouped_mm(gradient, weight, offs=ends)
        return to_rows, functional.grouped_mm(gradient.T, rows, offs=ends), None
