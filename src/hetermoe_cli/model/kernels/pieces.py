"""Pieces of large tensors, so that what is made of them on the way stays small, and in a CPU's cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

_ELEMENTS = 2**17  # half a mebibyte in fp32, well inside a core's second-level cache


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each [rows, ...] at a time on a CPU, by the first one's width; a card is better off with few
    launches."""
    first = tensors[0]
    rows = _ELEMENTS // first.shape[1:].numel() if first.device.type == "cpu" else len(first)
    return zip(*(torch.split(tensor, max(rows, 1)) for tensor in tensors), strict=True)
