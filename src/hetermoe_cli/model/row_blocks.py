"""Products of an expert's rows in few sizes, for oneDNN.

In bf16 and fp16 on a CPU oneDNN compiles a kernel for every shape that it meets, which takes as long as 4 to 40
products of 50 to 300 rows and keeps 0.7 to 1.5 MB. A learned router brings new numbers of rows in every step. Here a
product gets as many rows as the next size of a coarse ladder has. What is added costs little: tiles have 16 or 32 rows
anyway, and odd depths are slow (a weight's gradient from 100 rows takes 1.6 times as long as one from 96).
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

_HALF, _STEP = 16, 32  # rows of a tile of AMX; of two, from where sums over rows are fast
_LINEAR = 256  # rows up to which sizes are multiples of _STEP; above, every doubling has 8 sizes


def are_compiled(rows: Tensor) -> bool:
    """Whether products of rows like these have a kernel of their own for every number of them."""
    return rows.device.type == "cpu" and rows.dtype != torch.float32 and _compiles(rows.dtype)


@cache
def _compiles(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def rounded(count: int) -> int:
    """The next size from `count` rows up: at most an eighth more, or 16 or 31 rows where there are few."""
    if count <= _HALF:
        return _HALF
    step = max(_STEP, 1 << (count - 1).bit_length() - 4)
    return -(-count // step) * step


def times(rows: Tensor, start: int, count: int, matrix: Tensor, result: Tensor) -> None:
    """rows [M, I] from `start`, `count` of them, times matrix [I, O] into the same rows of result [M, O].

    Rows of `result` behind these get anything: whoever computes several parts begins with the first.
    """
    size = rounded(count)
    part = rows[start : start + size]
    if len(part) == size:  # with rows of others, if need be: a row does not see its neighbours
        torch.mm(part, matrix, out=result[start : start + size])
    else:
        result[start : start + count] = torch.mm(padded(rows[start : start + count]), matrix)[:count]


def padded(rows: Tensor) -> Tensor:
    """`rows` [n, I] with zeros behind them, up to the next size."""
    more = rounded(len(rows)) - len(rows)
    return functional.pad(rows, (0, 0, 0, more)) if more else rows
