"""Products of an expert's rows in few sizes, for oneDNN.

In bf16 and fp16 on a CPU oneDNN compiles a kernel for every shape that it meets, which takes as long as 4 to 40
products of 50 to 300 rows and keeps 0.7 to 1.5 MB. A learned router brings new numbers of rows in every step. Here a
product gets as many rows as the next size of a coarse ladder has: an expert's rows are followed by zeros from its first
product to its last. What is added costs little: tiles have 16 or 32 rows anyway, and odd depths are slow (a weight's
gradient from 100 rows takes 1.6 times as long as one from 96).
"""

from collections.abc import Sequence
from functools import cache
from itertools import chain

import torch
from torch import Tensor

_HALF, _STEP = 16, 32  # rows of a tile of AMX; of two, from where sums over rows are fast
_PARTS = 4  # sizes of a doubling: with 8 steps take 5 % longer, as more kernels push each other out of the caches


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
    """The next size from `count` rows up: at most a quarter more, or 15 or 31 rows where there are few. 0 for none."""
    if count <= _HALF:
        return _HALF if count else 0
    step = max(_STEP, (1 << (count - 1).bit_length() - 1) // _PARTS)
    return -(-count // step) * step


class Blocks:
    """Rows sorted by expert, and the same with zeros behind each expert's, so that there are `sizes` of them."""

    def __init__(self, rows: Tensor, counts: Sequence[int]) -> None:
        """For rows like these, the first counts[0] for the first expert and so on. Only where kernels are compiled are
        there any zeros."""
        self._counts = list(counts)
        self.sizes = [rounded(count) for count in counts] if are_compiled(rows) else self._counts

    def pack(self, rows: Tensor) -> Tensor:
        """rows [M, I] -> [sum of sizes, I]; the same tensor if nothing comes between."""
        if self.sizes == self._counts:
            return rows
        more = [size - count for size, count in zip(self.sizes, self._counts, strict=True)]
        zeros = rows.new_zeros(max(more), rows.shape[1])
        parts = zip(torch.split(rows, self._counts), (zeros[:count] for count in more), strict=True)
        return torch.cat(list(chain.from_iterable(parts)))

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse."""
        if self.sizes == self._counts:
            return packed
        blocks = zip(torch.split(packed, self.sizes), self._counts, strict=True)
        return torch.cat([block[:count] for block, count in blocks])
