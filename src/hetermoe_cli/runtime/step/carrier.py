"""Carrier: moves one transfer for a lane: counts ahead, rows in exact sizes, or a collective.

Whatever needs numbers on the host waits for them here, never in the compute thread. Messages lie on the mesh's wire:
with NCCL they stay on the device, with gloo they pass through the host.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from hetermoe_cli.model.copies import Fetched, upload
from hetermoe_cli.runtime.clocks.clock import Clock
from hetermoe_cli.runtime.machine.mesh import Mesh
from hetermoe_cli.runtime.modules.collectives import Collectives
from hetermoe_cli.runtime.transfers.calls import has_counts
from hetermoe_cli.runtime.transfers.dispatcher import Arrivals, LayerMap, Routing
from hetermoe_cli.runtime.transfers.lanes import Handoff, Parcel, exchange
from hetermoe_cli.runtime.transfers.slots import tail_size
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.spec.layout import Layout, in_both

Place = tuple[int, int]  # (layer, micro-batch)


class Tokens(NamedTuple):
    """Tokens of a micro-batch that go to, or come from, each rank on the other side of a border, in their order."""

    sizes: list[int]


class Carrier:
    """The sizes of one pass, and the transfers that need them.

    `empty` [0, H] is like the rows in precision and width. `counts` [layers, micro-batches, experts]: rows that this
    rank routed.
    """

    def __init__(
        self,
        layout: Layout,
        mesh: Mesh,
        maps: Sequence[LayerMap],
        empty: Tensor,
        schedule: Schedule,
        clock: Clock,
        collectives: Collectives,
        sequence_length: int = 0,
    ) -> None:
        """`sequence_length`: tokens, where hidden states cross borders."""
        self._collectives = collectives
        self._mesh, self._maps, self._schedule, self._clock = mesh, maps, schedule, clock
        width, tail = empty.shape[1], tail_size(empty.dtype, maps[0].tail)
        again = layout.span_of(mesh.rank).schedule.sends_again * (width + tail)
        self._empty = {
            (kind, direction): empty.new_empty(0, width + more)
            for kind, direction, more in (
                (Kind.DISPATCH, Pass.FORWARD, tail),
                (Kind.COMBINE, Pass.FORWARD, 0),
                (Kind.COMBINE, Pass.BACKWARD, again),
                (Kind.DISPATCH, Pass.BACKWARD, tail),
                (Kind.CROSS, Pass.FORWARD, 0),
                (Kind.CROSS, Pass.BACKWARD, 0),
            )
        }
        self._layout, self._length = layout, sequence_length
        self._crossings: dict[tuple[int, int, bool], Tokens] = {}
        places = [(layer, j) for layer in range(layout.layers) for j in range(layout.micro_batches)]
        self._routed: dict[Place, Future[Routing]] = {place: Future() for place in places}
        self._arrivals: dict[Place, Arrivals] = {}
        self._waits: dict[object, float] = {}  # seconds
        self.counts: NDArray[np.int32] = np.zeros((layout.layers, layout.micro_batches, layout.experts), np.int32)

    def empty(self, action: Action) -> Tensor:
        """[0, width] like what `action` moves."""
        return self._empty[action.kind, action.direction]

    # Called by the compute thread.

    def routed(self, place: Place, routing: Routing) -> None:
        """The gate has decided."""
        self._routed[place].set_result(routing)

    def routing(self, place: Place) -> Routing:
        """The plan of what this rank sends; waits until the gate has decided."""
        return self._routed[place].result()

    def forget(self, place: Place) -> None:
        """This rank's rows of `place` are all back."""
        del self._routed[place]

    def arrivals(self, place: Place) -> Arrivals:
        """The plan of what this rank's experts get, for the current stream; known once the dispatch has come."""
        return self._arrivals[place].take()

    def computed(self, place: Place) -> None:
        """This rank's experts will not be asked for `place` again."""
        del self._arrivals[place]

    def stays(self, place: Place) -> None:
        """A dispatch that brings this rank's experts no rows of others: plan for its own.

        Here the compute thread waits for sizes: a loop over experts needs them on the host.
        """
        if place not in self._arrivals:
            routing = self.routing(place)
            self._note(place, routing)
            own = {self._mesh.rank: routing.told(self._mesh.rank)}
            self._arrivals[place] = self._maps[place[0]].arrivals(own, self._mesh.device)

    def incoming(self, action: Action) -> list[int]:
        """Rows per source rank. A lane may ask for a combine's before the gate has decided: then it waits."""
        if action.kind is Kind.CROSS:
            return self._crossing(action, before=action.direction is Pass.BACKWARD).sizes
        place = action.layer, action.micro_batch
        return self._arrivals[place].sizes if action.towards_experts else self.routing(place).sizes

    def crossing(self, action: Action) -> Tokens:
        """What this rank sends to those on the other side of a border between pipeline stages, or before the head."""
        return self._crossing(action, before=action.direction is Pass.FORWARD)

    def _crossing(self, action: Action, *, before: bool) -> Tokens:
        """What it has in common with those, where it has some of the tokens `before` it, or behind it."""
        layout, nothing = self._layout, range(0)
        key = action.layer, action.micro_batch if layout.shifts else 0, before
        if key not in self._crossings:
            sides = layout.crossing(action.layer, self._length * layout.sequences_per_micro_batch, key[1])
            here, there = sides if before else sides[::-1]
            own = here.get(self._mesh.rank, nothing)
            common = [in_both(own, there.get(other, nothing)) for other in range(layout.world_size)]
            self._crossings[key] = Tokens(common)
        return self._crossings[key]

    def departing(self, action: Action) -> Routing:
        """Of a dispatch: what tells the numbers that go ahead of it."""
        place = action.layer, action.micro_batch
        routing = self.routing(place)
        self._note(place, routing)
        return routing

    def came(self, action: Action, table: dict[int, list[int]]) -> None:
        """Plan for rows of a dispatch: `table[source]`, of other ranks, has the numbers that went ahead of them."""
        place = action.layer, action.micro_batch
        if self._mesh.rank in self._schedule.senders[action]:
            table[self._mesh.rank] = self.routing(place).told(self._mesh.rank)
        self._arrivals[place] = self._maps[action.layer].arrivals(table, self._mesh.device)

    def abort(self, error: BaseException) -> None:
        """Wake who waits for the gate."""
        for future in self._routed.values():
            if not future.done():
                future.set_exception(error)

    @property
    def waited(self) -> float:
        """Seconds that threads of this rank waited for the device to tell numbers of rows; none on the CPU."""
        return sum(self._waits.values())

    # Called by the lanes.

    def carry(self, action: Action, rows: Tensor | None, parcel: Parcel | None) -> Handoff:
        """Move one transfer: send `rows` as `parcel` says, receive what comes; or do a collective with them."""
        began = self._clock.mark()
        if action.is_collective:
            assert rows is not None
            return self._carried(action, self._collectives.carry(action, rows), began)
        mesh, group = self._mesh, self._group(action)
        if has_counts(action):
            self._exchange_counts(action, (action.layer, action.micro_batch))
        sends: dict[int, Tensor] = {}
        if rows is not None and parcel is not None:
            sizes = parcel.sizes
            sends = self._others(mesh.on_wire(rows[: sum(sizes)]), sizes)
        buffer = self._buffer(action, 0)
        receives: dict[int, Tensor] = {}
        if mesh.rank in self._schedule.receivers[action]:
            sizes = self.incoming(action)
            buffer = self._buffer(action, sum(sizes))
            receives = self._others(buffer, sizes)
        exchange(group, sends, receives)
        return self._carried(action, upload(buffer, mesh.device), began)

    def _group(self, action: Action) -> ProcessGroup:
        mesh = self._mesh
        if action.kind is Kind.CROSS:
            return mesh.stages[2 * (self._layout.border(action.layer) % 2) + (action.direction is Pass.BACKWARD)]
        return mesh.to_experts if action.towards_experts else mesh.from_experts

    def _buffer(self, action: Action, rows: int) -> Tensor:
        wire, empty = self._mesh.wire, self.empty(action)
        pinned = wire.type != self._mesh.device.type
        return torch.empty((rows, empty.shape[1]), dtype=empty.dtype, device=wire, pin_memory=pinned)

    def _others(self, rows: Tensor, sizes: list[int]) -> dict[int, Tensor]:
        """Parts of `rows` that cross the wire, by peer."""
        return {peer: part for peer, part in enumerate(torch.split(rows, sizes)) if peer != self._mesh.rank}

    def _carried(self, action: Action, rows: Tensor, began: object) -> Handoff:
        handoff = Handoff.of(rows)
        handoff.start, handoff.end = began, self._clock.mark()
        self._clock.transferred(action, handoff)
        return handoff

    def _exchange_counts(self, action: Action, place: Place) -> None:
        """Hosts learn how many rows come from whom: the only unknown sizes of an iteration.

        With NCCL the counts go out before this rank's host knows them.
        """
        mesh, sends, receives = self._mesh, {}, {}
        senders, receivers = self._schedule.senders[action], self._schedule.receivers[action]
        if mesh.rank in senders:
            routing = self.routing(place)
            sends = {peer: routing.told_vector(peer, mesh.wire) for peer in receivers if peer != mesh.rank}
        if mesh.rank in receivers:
            told = self._maps[action.layer].told
            receives = {
                peer: torch.empty(told, dtype=torch.int64, device=mesh.wire) for peer in senders if peer != mesh.rank
            }
        exchange(mesh.to_experts, sends, receives)
        if mesh.rank in senders:
            self._note(place, routing)
        if mesh.rank in receivers:
            fetched = {peer: Fetched(counts) for peer, counts in receives.items()}
            table = {peer: counts.wait().tolist() for peer, counts in fetched.items()}
            self._waits |= {(place, peer): counts.waited for peer, counts in fetched.items()}
            self.came(action, table)

    def _note(self, place: Place, routing: Routing) -> None:
        """Keep what this rank routed, and how long a thread waited to know."""
        self.counts[place] = routing.by_expert
        self._waits[place] = routing.waited
