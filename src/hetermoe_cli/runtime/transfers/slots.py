"""Slots: which rows are copied where, and summed back. What a dispatch carries is a row and a tail of combine weights.

T = tokens or rows that came, k = choices of each, H = hidden size.
"""

import torch
from torch import Tensor
from torch.nn import functional

_TAIL_BYTES = 16  # a multiple of it keeps rows aligned for grouped products


def tail_size(dtype: torch.dtype, elements: int = 1) -> int:
    """Elements behind a row of a dispatch, of which the first `elements` count."""
    return -(-elements * dtype.itemsize // _TAIL_BYTES) * _TAIL_BYTES // dtype.itemsize


class Slots:
    """The (token, choice) slots of T tokens in sending order: `order` [T * k].

    Those that do not travel come last; the M others do. M may be known on the host only later, so that what is gathered
    has `most` rows, T * k if that is not given, the first M of which count.
    """

    def __init__(self, order: Tensor, top_k: int, most: int | None = None) -> None:
        self.order, self.top_k = order, top_k
        self.most = len(order) if most is None else most

    def tokens(self) -> Tensor:
        """[most] whose row is copied."""
        return self.order[: self.most] // self.top_k

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """rows [T, H] -> [most, H] in sending order, in `out` if that is given."""
        return torch.index_select(rows, 0, self.tokens(), out=out)

    def gather_weighted(self, rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        """rows [T, H] and weights [T, k] -> [most, H + tail] in sending order, each with its weight, in `out`."""
        width = rows.shape[1]
        self.gather(rows, out[:, :width])
        out[:, width] = weights.flatten().index_select(0, self.order[: self.most])
        return out

    def summed(self, sent: Tensor) -> Tensor:
        """[M, H] in sending order -> [T, H], the sum of a token's rows."""
        if len(sent) == len(self.order):
            return functional.embedding_bag(inverse(self.order).view(-1, self.top_k), sent, mode="sum")
        if not len(sent):
            return sent.new_zeros(len(self.order) // self.top_k, sent.shape[1])
        places, starts = self._bags(len(sent))
        return functional.embedding_bag(places, sent, starts, mode="sum")

    def _bags(self, rows: int) -> tuple[Tensor, Tensor]:
        """Of so many rows in sending order: their places token by token, and where each token's start."""
        place = inverse(self.order)
        travels = place < rows
        counts = travels.view(-1, self.top_k).sum(dim=1)
        return place[torch.nonzero_static(travels, size=rows).squeeze(1)], counts.cumsum(0) - counts

    def to_tokens(self, sent: Tensor) -> Tensor:
        """[M, H] in sending order -> [T, k, H], zeros where nothing travelled."""
        slots, (rows, width) = len(self.order), sent.shape
        if rows == slots:
            result = sent.index_select(0, inverse(self.order))
        else:
            result = sent.new_zeros(slots, width)
            result[self.order[:rows]] = sent
        return result.view(-1, self.top_k, width)


def inverse(order: Tensor) -> Tensor:
    """Of a permutation [n]. Reading rows by it is several times faster on a CPU than writing them by `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
