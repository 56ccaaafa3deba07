"""Gradients of one rank: where they accumulate, how they are summed over ranks and clipped by the true global norm."""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from hetermoe_cli.model.kernels.grouped import give_place
from hetermoe_cli.model.kernels.pieces import pieces
from hetermoe_cli.model.optimizer import AdamW
from hetermoe_cli.runtime.machine.mesh import Mesh
from hetermoe_cli.runtime.modules.gradient_shares import GradientShares
from hetermoe_cli.runtime.modules.parts import Holding
from hetermoe_cli.runtime.modules.shards import Shards
from hetermoe_cli.schedule.action import Action

_ROW = 4096  # elements


class Gradients:
    """Preallocated gradients: what got no token is zero, not missing.

    `shared` parameters (dense part, replicated experts, with several groups also hosted ones) have views of one flat
    buffer of dtype `exchange`, a segment for every layer and one for the head; a lane calls `reduce` on each as soon as
    it is complete. `own` parameters exist once in the world and have gradients of their own dtype. In fp32 and wider,
    autograd, and experts by hand, accumulate into these in place. In fp16 and bf16 a parameter's micro-batches
    accumulate in a temporary fp32 gradient, which `fold` rounds into its place once for every run of micro-batches:
    small contributions are not lost, and only the layer at work has fp32 gradients. `sharded`: the dense part's
    instead, where it is fully sharded; it is not in `shared` then. What several groups hold of it is summed over all of
    them with the last window, else within the group. Of what `shards` shares out, its weights whole, a rank gets the
    sum of its own share only.
    """

    def __init__(
        self,
        shared: Sequence[Sequence[nn.Parameter]],
        own: Iterable[nn.Parameter],
        mesh: Mesh,
        exchange: torch.dtype,
        holdings: Sequence[Sequence[Holding]] = (),
        sharded: GradientShares | None = None,
        last: int = 0,
        stacks: Iterable[nn.Parameter] = (),
        shards: Shards | None = None,
    ) -> None:
        """`holdings`: whom each segment is summed over, nobody if empty; `last`: micro-batch after whose backward
        `shared` ones are complete; `stacks`: experts, whose first gradient is written in place where it has its
        dtype."""
        self._mesh, self._holdings, self._sharded, self._last = mesh, holdings, sharded, last
        joined = sharded is not None and mesh.gathering is not mesh.attending  # the dense part's gradients come along
        self._shares = [
            [shards.segment_of(layer, one) if shards and not (joined and one is some[0]) else None for one in some]
            for layer, some in enumerate(holdings)
        ]
        self._own = list(own)
        sizes = [sum(p.numel() for p in segment) for segment in shared]
        self._flat = torch.zeros(sum(sizes), dtype=exchange, device=mesh.device)
        self._segments = torch.split(self._flat, sizes)
        self._places: dict[nn.Parameter, Tensor] = {}
        self._in_place: list[nn.Parameter] = []
        self._stacks = set(stacks)  # of these, those that experts write by hand, and all of it
        offset = 0
        for parameter in chain.from_iterable(shared):
            self._place(parameter, self._flat[offset : offset + parameter.numel()].view_as(parameter))
            offset += parameter.numel()
        for parameter in self._own:
            self._place(parameter, torch.zeros_like(parameter))
        self._stacks &= {p for p in self._in_place if p.numel() and p.dtype == self._places[p].dtype}
        for parameter in self._stacks:
            give_place(parameter, self._places[parameter])
        self._added_to = [self._places[p] for p in self._places if p not in self._stacks and p.numel()]

    def _place(self, parameter: nn.Parameter, place: Tensor) -> None:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        self._places[parameter] = place
        if parameter.dtype != wide:
            parameter.grad_dtype = wide  # what autograd accumulates in
        if place.dtype == wide:
            parameter.grad = place
            self._in_place.append(parameter)

    @property
    def nothing(self) -> Tensor:
        """[0] on this rank's device."""
        return self._flat[:0]

    @property
    def _own_gradients(self) -> list[Tensor]:
        return [self._places[p] for p in self._own if p.numel()]

    def zero(self) -> None:
        """Start a new iteration."""
        if self._added_to:
            torch._foreach_zero_(self._added_to)
        for parameter in self._places:
            parameter.grad = None  # what an iteration that failed may have left
        for parameter in self._in_place:
            if parameter not in self._stacks:
                parameter.grad = self._places[parameter]
        if self._sharded:
            self._sharded.zero()

    def fold(self, parameters: Iterable[nn.Parameter]) -> None:
        """After a run of micro-batches: round temporary fp32 gradients into their places, and clear those of experts
        that nothing was written to. Sharded ones wait for `segment`."""
        for parameter in parameters:
            place = self._places.get(parameter)
            if parameter in self._stacks and parameter.grad is None:
                parameter.grad = self._places[parameter].zero_()
            if place is not None and parameter.grad is not None and parameter.grad.dtype != place.dtype:
                _add(place, parameter.grad)
                parameter.grad = None

    def segment(self, layer: int) -> Tensor:
        """[n] gradients of a layer, or, one after the last layer, of the head, which are to be summed: the sharded
        ones, else the shared ones."""
        return self._sharded.collect(layer) if self._sharded else self._segments[layer]

    def reduce(self, action: Action, given: Tensor) -> Tensor:
        """Sum a segment over all that hold its parameters; of sharded gradients this rank keeps its share."""
        layer, group = action.layer, self._mesh.gathering
        if self._sharded is None:
            self._sum_shared(layer)
            return given
        assert group is not None
        dense, last = self._sharded.add_earlier(layer, given), action.micro_batch == self._last
        if last and group is not self._mesh.attending:
            self._sum_shared(layer, dense)
        else:
            self._mesh.reduce_scatter(given, self._sharded.shares[layer].numel(), group)
            if last:
                self._sum_shared(layer)
        return self._sharded.keep(layer, given)

    def _sum_shared(self, layer: int, dense: Tensor | None = None) -> None:
        """In place: one message for each set of holders. `dense`: gradients of the dense part that are not in the
        buffer."""
        for holding, segment in zip(self._holdings[layer], self._shares[layer], strict=True):
            pieces = self._pieces(holding)
            if dense is not None:  # it is in the first message, that of all who attend
                pieces, dense = [dense, *pieces], None
            if pieces and len(holding.holders) > 1:
                message = pieces[0] if len(pieces) == 1 else torch.cat([piece.flatten() for piece in pieces])
                group = self._mesh.shared[holding.holders]
                if segment:
                    self._mesh.reduce_scatter(message, segment.share, group)
                else:
                    self._mesh.all_reduce(message, group)
                if len(pieces) > 1:
                    mine = slice(0, len(message)) if segment is None else segment.range
                    views = _within(pieces, mine)
                    for view, found in zip(views, torch.split(message[mine], list(map(len, views))), strict=True):
                        view.copy_(found)

    def _pieces(self, holding: Holding) -> list[Tensor]:
        """Views of the gradients, in their order; a single one where they lie in the flat buffer one after another."""
        places = ((self._places[parameter], index) for parameter, index in holding.slices)
        views = [place if index is None else place[index] for place, index in places]
        if not views:
            return []
        start = end = views[0].storage_offset()
        for view in views:
            if view.storage_offset() != end:
                return views
            end += view.numel()
        return [self._flat[start:end]]

    def totals(self, figures: Tensor) -> tuple[Tensor, float]:
        """Sum `figures` [n] float64 over all ranks, once all segments are summed over their holders.

        Returns (summed figures, global gradient norm) on the host, which waits for the device here; the norm is not
        finite if a gradient of any rank is not.
        """
        square = torch.zeros(1, dtype=torch.float64, device=self._mesh.device)
        for share in self._sharded.shares if self._sharded and self._sharded.counted else ():
            square += _square(share)
        pairs = zip(chain.from_iterable(self._holdings), chain.from_iterable(self._shares), strict=True)
        for holding, segment in pairs:
            if segment:
                for gradient in _within(self._pieces(holding), segment.range):
                    square += _square(gradient)
            elif self._mesh.process == holding.holders[0]:  # one copy of what several processes hold
                for gradient in self._pieces(holding):
                    square += _square(gradient)
        for gradient in self._own_gradients:
            square += _square(gradient)
        total = torch.cat([square, figures])
        self._mesh.all_reduce(total)
        total = total.cpu()
        return total[1:], float(total[0].sqrt())

    def apply(self, optimizer: AdamW, factor: float) -> None:
        """One optimizer step from `factor` times these gradients."""
        if optimizer.pieces or optimizer.has_masters or len(self._in_place) < len(self._places):
            pieces = self._sharded.pieces() if self._sharded else {}
            optimizer.update({**pieces, **self._places}, factor)
            return
        optimizer.step_from(factor, [g for g in (self._flat, *self._own_gradients) if g.numel()])


def clip_factor(norm: float, limit: float) -> float:
    """What scales gradients of global norm `norm` to at most `limit`."""
    return min(1.0, limit / (norm + 1e-6))


def _within(pieces: Sequence[Tensor], wanted: slice) -> list[Tensor]:
    """Flat views of what lies in `wanted` of the pieces' elements, one after another."""
    result, offset = [], 0
    for piece in pieces:
        flat = piece.view(-1)
        part = flat[max(wanted.start - offset, 0) : max(wanted.stop - offset, 0)]
        if len(part):
            result.append(part)
        offset += len(flat)
    return result


def _add(place: Tensor, gradient: Tensor) -> None:
    """A wider gradient to its place: in pieces, as a CPU widens narrow ones to add wide ones."""
    for part, given in pieces(place.view(-1), gradient.flatten()):
        part.add_(given)


def _square(gradient: Tensor) -> Tensor:
    """Sum of squares in float64, of rows whose own sums are of the gradient's precision or fp32: a float64 copy of it
    all would take longer than the optimizer."""
    flat = gradient.flatten()
    whole = flat.numel() // _ROW * _ROW
    wide = torch.promote_types(gradient.dtype, torch.float32)
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=wide)
    rest: Tensor = torch.linalg.vector_norm(flat[whole:], dtype=wide)
    total: Tensor = norms.double().square().sum() + rest.double().square()
    return total
