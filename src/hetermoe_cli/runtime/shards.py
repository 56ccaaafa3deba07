"""The dense part in equal shares of its attending ranks, segment by segment (a layer, or the head).

`dense_state: optimizer` (ZeRO-1): each rank holds master and moments of its share, steps it and tells the others.
`full`: its masters are all that a rank holds between the stages of a segment. Whole weights are gathered into storage
that is there from `gather` to `release` only; tensors that autograd saved in forward refer to it and are valid again
once the same weights are back (the technique of PyTorch's first FSDP).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hetermoe_cli.model.optimizer import AdamW, Piece, Pieces
from hetermoe_cli.model.training_state import state_slices, state_tensors
from hetermoe_cli.model.transformer import parameter_slices
from hetermoe_cli.runtime.mesh import Mesh
from hetermoe_cli.runtime.parts import Parts

_ALIGNMENT = 16  # elements: AdamW on CPUs rounds what is left over by its vectors in another way (copies step alike)


@dataclass(frozen=True)
class Segment:
    """The parameters of one segment. `whole` [ranks * n]: their weights, one after another and padded, of which the
    parameters are views; `master` [n]: this rank's share, number `own`, in fp32 or wider; `pieces`: what of a parameter
    is in it."""

    parameters: list[nn.Parameter]
    whole: Tensor
    master: Tensor
    pieces: dict[nn.Parameter, Piece | None]
    own: int

    @classmethod
    def of(
        cls, parameters: list[nn.Parameter], masters: Mapping[Any, Tensor], count: int, own: int, kept: bool
    ) -> "Segment":
        """Share `own` of `count`. `masters`: those of narrow parameters. `kept`: the weights are to stay whole; where
        they are wide the share is a part of them."""
        sizes = [parameter.numel() for parameter in parameters]
        share = -(-sum(sizes) // (count * _ALIGNMENT)) * _ALIGNMENT
        whole = parameters[0].detach().new_zeros(share * count)
        wide = torch.promote_types(whole.dtype, torch.float32)
        mine = whole[own * share : (own + 1) * share]
        master = mine if kept and wide == whole.dtype else torch.zeros_like(mine, dtype=wide)
        pieces: dict[nn.Parameter, Piece | None] = {}
        offset = 0
        for parameter, size in zip(parameters, sizes, strict=True):
            values = masters.get(parameter, parameter.detach())
            parameter.data = whole[offset : offset + size].view_as(parameter).copy_(parameter.detach())
            start, stop = (min(max(edge * share - offset, 0), size) for edge in (own, own + 1))
            first = offset + start - own * share
            piece = Piece(start, stop, master[first : first + stop - start]) if start < stop else None
            if piece:
                piece.weight.copy_(piece.of(values))
            pieces[parameter] = piece
            offset += size
        return cls(parameters, whole, master, pieces, own)

    @property
    def size(self) -> int:
        """Elements of its parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def share(self, flat: Tensor) -> Tensor:
        """This rank's part of `flat` [ranks * n]: a view."""
        return flat.chunk(len(self.whole) // len(self.master))[self.own]

    def split(self, flat: Tensor) -> list[Tensor]:
        """`flat` [ranks * n], cut into views like the parameters."""
        sizes = [parameter.numel() for parameter in self.parameters]
        parts = torch.split(flat[: self.size], sizes)
        return [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]

    def resize(self, elements: int) -> None:
        """Give the whole weights storage, or none."""
        self.whole.untyped_storage().resize_(elements * self.whole.element_size())


class Shards:
    """Who steps what of the dense part. What gathers is collective over the attending ranks: of all groups where
    weights are kept whole, else of this one."""

    def __init__(self, parts: Parts, mesh: Mesh, kept: bool = True) -> None:
        """Fills and cuts one segment after another, so that no more of what other ranks will hold is ever here; `kept`:
        weights stay whole on every rank."""
        group = mesh.attending if kept else mesh.gathering
        assert group is not None
        self._mesh, self._parts, self._group, self.kept = mesh, parts, group, kept
        self._count, self._own = dist.get_world_size(group), dist.get_rank(group)
        self.segments: list[Segment] = []
        for parameters in parts.dense_segments():
            parts.fill(parameters)
            self.segments.append(Segment.of(parameters, parts.masters, self._count, self._own, kept))
            for parameter in parameters:
                parts.masters.pop(parameter, None)
            if not kept:
                self.segments[-1].resize(0)
        self.pieces: Pieces = {p: piece for segment in self.segments for p, piece in segment.pieces.items()}

    def gather(self, layer: int) -> Tensor:
        """The whole weights of a segment, in storage of their own until `release`."""
        segment = self.segments[layer]
        segment.resize(len(segment.whole))
        self._fill(segment)
        return segment.whole

    def release(self, layer: int) -> None:
        """Drop the whole weights of a segment."""
        self.segments[layer].resize(0)

    def tell(self) -> None:
        """After a step: every rank's new weights to all others."""
        for segment in self.segments:
            self._fill(segment)

    def _fill(self, segment: Segment) -> None:
        """All ranks' masters into the whole weights, in a precision that holds all ranks' weights."""
        dtype, wire, whole = self._parts.gathered, self._mesh.wire, segment.whole
        direct = whole.dtype == dtype and whole.device.type == wire.type
        everyone = whole if direct else torch.empty(len(whole), dtype=dtype, device=wire)
        self._mesh.all_gather(everyone, segment.master.to(device=wire, dtype=dtype), self._group)
        if not direct:
            whole.copy_(everyone)

    def tensors(self, optimizer: AdamW) -> dict[str, Tensor]:
        """Master and moments of the whole parameters that this rank is to save, by name: every parameter is saved by
        one of the ranks, in turn, so that none needs room for all of them."""
        names = {p: name for name, (p, index) in parameter_slices(self._parts).items() if index is None}
        saved: dict[str, Tensor] = {}
        turn = 0
        for segment in self.segments:
            states = [self._gathered(segment, mine) for mine in self._states(segment, optimizer)]
            for parameter, *whole in zip(segment.parameters, *states, strict=True):
                if turn % self._count == self._own:
                    saved |= state_tensors(names[parameter], (tensor.clone() for tensor in whole))
                turn += 1
        return saved

    def _states(self, segment: Segment, optimizer: AdamW) -> Iterator[list[Tensor]]:
        """Own pieces' masters, then both moments."""
        own = [state_slices(optimizer, piece.weight, None) for piece in segment.pieces.values() if piece]
        for kind in range(3):
            yield [states[kind] for states in own]

    def _gathered(self, segment: Segment, mine: Sequence[Tensor]) -> list[Tensor]:
        """All ranks' pieces of a segment put together, like its parameters."""
        wire, master = self._mesh.wire, segment.master
        own = torch.zeros_like(master, device=wire)
        if mine:
            torch.cat(list(mine), out=own[: sum(map(len, mine))])
        everyone = torch.empty(len(segment.whole), dtype=master.dtype, device=wire)
        self._mesh.all_gather(everyone, own, self._group)
        return segment.split(everyone)
