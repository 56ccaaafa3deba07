"""What several ranks hold, in equal shares of its holders, segment by segment: some of a layer, or the head.

`dense_state: optimizer` (ZeRO-1): each holder keeps master and moments of its share of the dense part and of experts
that others hold too, and steps them; others have old weights until the next pass gathers them. `full`: masters are all
that a rank holds of the dense part between the stages of a segment. Whole weights are gathered into storage that is
there from `make_room` to `release` only; tensors that autograd saved in forward refer to it and are valid again once
the same weights are back (the technique of PyTorch's first FSDP).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hetermoe_cli.model.optimizer import AdamW, Piece, part_of
from hetermoe_cli.model.transformer import parameter_slices
from hetermoe_cli.model.weights.training_state import fresh_state, state_slices, state_tensors
from hetermoe_cli.runtime.machine.mesh import Mesh
from hetermoe_cli.runtime.modules.parts import Holding, Parts, Slices
from hetermoe_cli.spec.world import World

_ALIGNMENT = 16  # elements: AdamW on CPUs rounds what is left over by its vectors in another way (copies step alike)


@dataclass(frozen=True)
class Segment:
    """Parameters, or experts in stacked ones, of the same holders. Their elements, one after another and padded, are
    cut into a share of `share` elements for each of `count`. `pieces`: what of each slice is in this rank's, `own`.

    `master` [share]: the pieces' weights one after another, in fp32 or wider; None where they are parts of parameters
    as wide, which stay whole. `whole` [holders * share]: what the parameters are views of, if they do not stay whole.
    """

    slices: Slices
    share: int
    count: int
    own: int
    pieces: list[Piece | None]
    master: Tensor | None
    whole: Tensor | None

    @classmethod
    def of(cls, slices: Slices, masters: Mapping[Any, Tensor], count: int, own: int, kept: bool) -> "Segment":
        """Share `own` of `count`. `masters`: those of narrow parameters. `kept`: the weights are to stay whole."""
        sizes = [part_of(*one).numel() for one in slices]
        unit, first = 1 if kept else _ALIGNMENT, slices[0][0].detach()
        share = -(-sum(sizes) // (count * unit)) * unit
        wide = torch.promote_types(first.dtype, torch.float32)
        master = None if kept and wide == first.dtype else first.new_zeros(share, dtype=wide)
        whole = None if kept else first.new_zeros(share * count)
        pieces: list[Piece | None] = []
        offset = -own * share  # of a slice in this share
        for (parameter, index), size in zip(slices, sizes, strict=True):
            start, stop = (min(max(edge - offset, 0), size) for edge in (0, share))
            values = part_of(masters.get(parameter, parameter), index).view(-1)[start:stop]
            if master is not None and start < stop:
                values = master[offset + start : offset + stop].copy_(values)
            pieces.append(Piece(start, stop, values) if start < stop else None)
            if whole is not None:
                place = whole[offset + own * share :][:size]
                parameter.data = place.view_as(parameter).copy_(parameter.detach())
            offset += size
        return cls(slices, share, count, own, pieces, master, whole)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In order; a stacked one as often as it has slices here."""
        return [parameter for parameter, _ in self.slices]

    @property
    def size(self) -> int:
        """Elements without padding."""
        return sum(part_of(*one).numel() for one in self.slices)

    @property
    def range(self) -> slice:
        """Where this rank's share is among the elements."""
        return slice(self.own * self.share, (self.own + 1) * self.share)

    @property
    def weights(self) -> Tensor:
        """[share] this rank's weights, in fp32 or wider."""
        return self.padded([piece.weight for piece in self.pieces if piece]) if self.master is None else self.master

    def padded(self, mine: Sequence[Tensor]) -> Tensor:
        """[share] what belongs to the pieces, one after another."""
        wide = torch.promote_types(self.slices[0][0].dtype, torch.float32)
        result = torch.zeros(self.share, dtype=wide, device=self.slices[0][0].device)
        if mine:
            torch.cat(list(mine), out=result[: sum(map(len, mine))])
        return result

    def share_of(self, flat: Tensor) -> Tensor:
        """This rank's part of `flat` [holders * share]: a view."""
        return flat[self.range]

    def split(self, flat: Tensor) -> list[Tensor]:
        """`flat` [holders * share], cut into views like the slices."""
        places = [part_of(*one) for one in self.slices]
        sizes = [place.numel() for place in places]
        parts = torch.split(flat[: sum(sizes)], sizes)
        return [part.view_as(place) for part, place in zip(parts, places, strict=True)]

    def fill(self, everyone: Tensor) -> None:
        """Make `everyone` [holders * share] the weights."""
        if self.whole is not None:
            self.whole.copy_(everyone)
            return
        for one, weights in zip(self.slices, self.split(everyone), strict=True):
            part_of(*one).copy_(weights)

    def resize(self, elements: int) -> None:
        """Give the whole weights storage, or none."""
        assert self.whole is not None
        self.whole.untyped_storage().resize_(elements * self.whole.element_size())


class Shards:
    """Who steps what of the parameters that several processes hold. What gathers is collective over their holders.

    `segments`: those of a fully sharded dense part, by layer, in shares of this group's attending ranks; the weights of
    all others stay whole. Where only some groups share out states, the experts' are not.
    """

    def __init__(self, parts: Parts, mesh: Mesh, world: World) -> None:
        """Fills and cuts one segment after another, so that no more of what other ranks will hold is ever here."""
        self._parts, self._mesh, self._world = parts, mesh, world
        self.pieces: dict[nn.Parameter, dict[int | None, Piece]] = {}
        self.segments: list[Segment] = []
        replica = world.replica_of(mesh.process)
        self._group = tuple(replica.attending)
        sharded = replica.layout.gathers and mesh.process in self._group
        for parameters in parts.dense_segments() if sharded else ():
            parts.fill(parameters)
            slices: Slices = [(parameter, None) for parameter in parameters]
            self.segments.append(self._segment(Holding(self._group, slices), kept=False))
            self._forget(parameters)
            self.segments[-1].resize(0)
        self._kept = [self._cut(layer) for layer in range(world.layers + 1)]

    def _cut(self, layer: int) -> list[tuple[Holding, Segment]]:
        """What of a layer this rank shares with others, its weights kept whole."""
        if not self._world.shares_states:
            return []
        dense = self._world.shares_dense_states
        found = self._parts.holdings_of(layer, self._world, self._mesh.process, dense=dense)
        shared = [holding for holding in found if holding.slices and len(holding.holders) > 1]
        parameters = {parameter: None for holding in shared for parameter, _ in holding.slices}
        self._parts.fill(parameters)
        result = [(holding, self._segment(holding, kept=True)) for holding in shared]
        self._forget(parameters)
        return result

    def _forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Masters of what is cut."""
        for parameter in parameters:
            self._parts.masters.pop(parameter, None)

    def _segment(self, holding: Holding, kept: bool) -> Segment:
        holders = holding.holders
        own = holders.index(self._mesh.process)
        segment = Segment.of(holding.slices, self._parts.masters, len(holders), own, kept)
        for (parameter, index), piece in zip(segment.slices, segment.pieces, strict=True):
            pieces = self.pieces.setdefault(parameter, {})
            if piece:
                pieces[index] = piece
        return segment

    def segment_of(self, layer: int, holding: Holding) -> Segment | None:
        """The shares of what is summed over `holding`, whose weights stay whole; None where it is not shared out."""
        kept = (segment for other, segment in self._kept[layer] if other.holders == holding.holders)
        segment = next(kept, None)
        return segment if segment and len(segment.slices) == len(holding.slices) else None

    def make_room(self, layer: int) -> None:
        """Storage for the weights of a fully sharded segment, until `release`. Both are called where its stages run: on
        CUDA the memory is that stream's, which lets nothing write it again before these have read it."""
        if self.segments:
            segment = self.segments[layer]
            assert segment.whole is not None
            segment.resize(len(segment.whole))

    def gather(self, layer: int, *, kept: bool) -> None:
        """The weights of a layer: those of a fully sharded segment, for which there is room, and (`kept`) new ones of
        all whose weights stay whole."""
        if self.segments:
            self._fill(self._group, self.segments[layer])
        for holding, segment in self._kept[layer] if kept else ():
            self._fill(holding.holders, segment)

    def release(self, layer: int) -> None:
        """Drop the whole weights of a segment."""
        self.segments[layer].resize(0)

    @torch.no_grad()
    def _fill(self, holders: tuple[int, ...], segment: Segment) -> None:
        """All holders' masters into the weights, in a precision that holds all of theirs."""
        dtype, wire, whole = self._parts.precisions.gathered(holders), self._mesh.wire, segment.whole
        direct = whole is not None and whole.dtype == dtype and whole.device.type == wire.type
        size = segment.share * segment.count
        everyone = whole if whole is not None and direct else torch.empty(size, dtype=dtype, device=wire)
        self._mesh.all_gather(everyone, segment.weights.to(device=wire, dtype=dtype), self._mesh.shared[holders])
        if everyone is not whole:
            segment.fill(everyone)

    def tensors(self, optimizer: AdamW) -> dict[str, Tensor]:
        """Master and moments of what this rank is to save, by name, on the CPU: every parameter, or expert, is saved by
        one of its holders, in turn, so that none needs room for all of them. Turns go by place in a segment: its
        holders may have other segments besides."""
        names = {(id(p), index): name for name, (p, index) in parameter_slices(self._parts).items()}
        saved: dict[str, Tensor] = {}
        counted = self.segments if self._world.counts_dense(self._mesh.process) else []
        full = [[(Holding(self._group, segment.slices), segment)] for segment in counted]
        for layer, segments in [*enumerate(full), *enumerate(self._kept)]:
            for holding, segment in segments:
                for turn, (one, whole) in enumerate(self._states(holding.holders, segment, optimizer), layer):
                    if turn % segment.count == segment.own:
                        name = names[id(one[0]), one[1]]
                        saved |= state_tensors(name, (tensor.to("cpu", copy=True) for tensor in whole))
        return saved

    def join(self, layer: int, optimizer: AdamW, steps_taken: int) -> None:
        """Between two steps, hold all masters and moments of what is kept whole of a layer's weights, until `cut`."""
        found = [
            (one, [state.clone() for state in states])
            for holding, segment in self._kept[layer]
            for one, states in self._states(holding.holders, segment, optimizer)
        ]
        for parameter in {parameter: None for (parameter, _), _ in found}:
            optimizer.drop(piece.weight for piece in self.pieces.pop(parameter).values())
            wide = torch.promote_types(parameter.dtype, torch.float32)
            master: Tensor = parameter
            if parameter.dtype != wide:
                master = self._parts.masters[parameter] = parameter.detach().to(wide)
            optimizer.add(parameter, [master])
            optimizer.state[master] = fresh_state(optimizer, master, steps_taken)
        with torch.no_grad():
            for (parameter, index), states in found:
                for target, state in zip(state_slices(optimizer, parameter, index), states, strict=True):
                    target.copy_(state)

    def cut(self, layer: int, world: World, optimizer: AdamW, steps_taken: int) -> None:
        """The inverse of `join`, for what is to be shared of the layer in `world`."""
        self._world = world
        self._kept[layer] = self._cut(layer)
        for _, segment in self._kept[layer]:
            for (parameter, index), piece in zip(segment.slices, segment.pieces, strict=True):
                if piece:
                    optimizer.state[piece.weight] = fresh_state(optimizer, piece.weight, steps_taken)
                    moments = state_slices(optimizer, parameter, index)[1:]
                    places = state_slices(optimizer, piece.weight, None)[1:]
                    for target, whole in zip(places, moments, strict=True):
                        target.copy_(piece.of(whole))
        for parameter in {parameter: None for _, segment in self._kept[layer] for parameter in segment.parameters}:
            optimizer.drop([parameter])
            optimizer.add(parameter, [piece.weight for piece in self.pieces[parameter].values()])

    def _states(
        self, holders: tuple[int, ...], segment: Segment, optimizer: AdamW
    ) -> Iterator[tuple[tuple[nn.Parameter, int | None], list[Tensor]]]:
        """Collective: every slice of a segment with its whole master and moments, put together on the wire."""
        own = [state_slices(optimizer, piece.weight, None) for piece in segment.pieces if piece]
        kinds = []
        for kind in range(3):
            mine = segment.padded([states[kind] for states in own]).to(self._mesh.wire)
            everyone = torch.empty(segment.share * segment.count, dtype=mine.dtype, device=self._mesh.wire)
            self._mesh.all_gather(everyone, mine, self._mesh.shared[holders])
            kinds.append(segment.split(everyone))
        for one, *states in zip(segment.slices, *kinds, strict=True):
            yield one, states
