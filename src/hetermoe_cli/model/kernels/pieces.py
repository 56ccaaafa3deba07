"""Pieces of large tensors, so that what is made of them on the way stays small, and in a CPU's cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

_ELEMENTS = 2**17  # half a mebibyte in fp32, well inside a core's second-level cache


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each [rows, ...] at a time on a CPU; a CUDA device is better off with few launches."""
    first = tensors[0]
    rows = len(first) if first.is_cuda else _ELEMENTS // first.shape[1]
    return zip(*(torch.split(tensor, max(rows, 1)) for tensor in tensors), strict=True)
