"""ZeRO-1: of the dense part each attending rank holds master and moments of one share, steps it and tells the others.

The parameters of a segment (a layer, or the head: `Parts.shared_segments`), flattened one after another, are cut into
equal shares, the last ones possibly shorter. Weights and gradients stay whole on every attending rank.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hetermoe_cli.model.optimizer import AdamW, Piece, Pieces
from hetermoe_cli.model.training_state import state_slices, state_tensors
from hetermoe_cli.model.transformer import parameter_slices
from hetermoe_cli.runtime.mesh import Mesh, peer_errors
from hetermoe_cli.runtime.parts import Parts


class Shards:
    """Who steps what of the dense part. All methods but `pieces` are collective over the attending ranks."""

    def __init__(self, parts: Parts, mesh: Mesh) -> None:
        """Takes the masters that other ranks will hold out of `parts`."""
        assert mesh.attending is not None
        self._mesh, self._parts, self._group = mesh, parts, mesh.attending
        self._count, self._own = dist.get_world_size(mesh.attending), dist.get_rank(mesh.attending)
        self._segments = parts.dense_segments()
        self.pieces: Pieces = {p: piece for segment in self._segments for p, piece in self._cut(segment, self._own)}
        self._keep_masters()

    def _keep_masters(self) -> None:
        masters: dict[nn.Parameter | Tensor, Tensor] = self._parts.masters
        for parameter, piece in self.pieces.items():
            whole = masters.pop(parameter, None)
            if whole is not None and piece:
                masters[piece.weight] = piece.of(whole).clone()

    def _cut(self, segment: Sequence[nn.Parameter], owner: int) -> Iterator[tuple[nn.Parameter, Piece | None]]:
        """What the share of `owner` has of each parameter."""
        share, offset = self._share(segment), 0
        for parameter in segment:
            size = parameter.numel()
            start = min(max(owner * share - offset, 0), size)
            stop = min(max((owner + 1) * share - offset, 0), size)
            weight = parameter.detach().view(-1)[start:stop]
            yield parameter, Piece(start, stop, weight) if start < stop else None
            offset += size

    def _share(self, segment: Sequence[nn.Parameter]) -> int:
        return -(-sum(parameter.numel() for parameter in segment) // self._count)

    def tell(self, optimizer: AdamW) -> None:
        """After a step: every rank's new weights to all others, in a precision that holds all ranks' weights."""
        with torch.no_grad():
            for segment in self._segments:
                mine = [optimizer.master(piece.weight) for p in segment if (piece := self.pieces[p])]
                told = self._gathered(segment, mine, self._parts.gathered)
                for parameter, values in zip(segment, told, strict=True):
                    parameter.copy_(values)

    def tensors(self, optimizer: AdamW) -> dict[str, Tensor]:
        """Master and moments of the whole parameters that this rank is to save, by name: every parameter is saved by
        one of the ranks, in turn, so that none needs room for all of them."""
        names = {p: name for name, (p, index) in parameter_slices(self._parts).items() if index is None}
        saved: dict[str, Tensor] = {}
        turn = 0
        for segment in self._segments:
            states = [self._gathered(segment, mine) for mine in self._states(segment, optimizer)]
            for parameter, *whole in zip(segment, *states, strict=True):
                if turn % self._count == self._own:
                    saved |= state_tensors(names[parameter], (tensor.clone() for tensor in whole))
                turn += 1
        return saved

    def _states(self, segment: Sequence[nn.Parameter], optimizer: AdamW) -> Iterator[list[Tensor]]:
        """Own pieces' masters, then both moments."""
        own = [state_slices(optimizer, piece.weight, None) for p in segment if (piece := self.pieces[p])]
        for kind in range(3):
            yield [states[kind] for states in own]

    def _gathered(
        self, segment: Sequence[nn.Parameter], mine: Sequence[Tensor], dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """All ranks' pieces of a segment put together, like its parameters; in their wide precision if not `dtype`."""
        dtype = dtype or torch.promote_types(self._parts.dtype, torch.float32)
        share, wire = self._share(segment), self._mesh.wire
        own = torch.zeros(share, dtype=dtype, device=wire)
        offset = 0
        for piece in mine:
            own[offset : offset + piece.numel()].copy_(piece)
            offset += piece.numel()
        everyone = torch.empty(share * self._count, dtype=dtype, device=wire)
        with peer_errors():
            dist.all_gather_into_tensor(everyone, own, group=self._group)
        sizes = [parameter.numel() for parameter in segment]
        flat = torch.split(everyone[: sum(sizes)], sizes)
        return [values.view_as(parameter) for values, parameter in zip(flat, segment, strict=True)]
