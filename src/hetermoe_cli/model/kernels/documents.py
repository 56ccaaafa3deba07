"""Packed documents: where they end, and positions that restart in each."""

from typing import NamedTuple

import torch
from torch import Tensor

from hetermoe_cli.model.copies import upload


class Documents(NamedTuple):
    """The N documents in tokens [B, S], cut where a sequence ends; T = B * S.

    `positions` [B, S] int64 inside a document, `borders` [N + 1] int32 in all T tokens, `lengths` of the documents.
    """

    positions: Tensor
    borders: Tensor
    lengths: list[int]


def find_documents(tokens: Tensor, end: int, device: torch.device) -> Documents:
    """Documents in tokens [B, S] on the CPU, each ending with the token `end`; the result's tensors are on `device`."""
    ends = tokens == end
    ends[:, -1] = True
    after = ends.flatten().nonzero().flatten() + 1
    borders = torch.cat([after.new_zeros(1), after])
    lengths = borders.diff()
    positions = torch.arange(tokens.numel()) - borders[:-1].repeat_interleave(lengths)
    return Documents(upload(positions.view_as(tokens), device), upload(borders.int(), device), lengths.tolist())
