"""Rows in and out of a rank's tasks, during one pass of a schedule: what is sent, what arrives, and what stays here."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hetermoe_cli.runtime.clocks.clock import Clock
from hetermoe_cli.runtime.machine.mesh import Mesh
from hetermoe_cli.runtime.modules.parts import Parts
from hetermoe_cli.runtime.step.carrier import Carrier
from hetermoe_cli.runtime.step.direct import DirectLane
from hetermoe_cli.runtime.transfers.calls import has_counts
from hetermoe_cli.runtime.transfers.dispatcher import LayerMap
from hetermoe_cli.runtime.transfers.lanes import Lanes, Parcel
from hetermoe_cli.schedule.action import Action
from hetermoe_cli.schedule.schedule import Schedule

MOST_AHEAD = 32  # micro-batches sent before a rank reads: a socket's queue holds 49 messages with counts of 256 experts


class Rows:
    """What a task sends goes to a lane, what it reads comes from one. `began`: when the task at work did, on the clock:
    with its rows."""

    began: float

    def __init__(
        self,
        mesh: Mesh,
        parts: Parts,
        maps: Sequence[LayerMap],
        lanes: Lanes,
        carrier: Carrier,
        clock: Clock,
    ) -> None:
        self._mesh, self._parts, self._maps = mesh, parts, maps
        self._lanes, self._carrier, self._clock = lanes, carrier, clock
        self._kept: dict[Action, tuple[Tensor, Parcel]] = {}  # rows some of which stay on this rank

    def start(self, schedule: Schedule, window: int) -> None:
        """Let the lanes carry what `schedule` says."""
        self._lanes.start(schedule, self._carrier.carry, self._direct(schedule, window))

    def _direct(self, schedule: Schedule, window: int) -> dict[int, DirectLane]:
        """Lanes 1 and 2, where the ranks of this copy share memory."""
        threads = self._mesh.ordered or self._clock.waits or window > MOST_AHEAD
        mail = () if threads else self._mesh.mail
        return {
            lane: DirectLane(self._mesh.rank, one, schedule, lane, self._carrier, self._clock)
            for lane, one in enumerate(mail[:2], 1)
        }

    def send(self, action: Action, rows: Tensor, parcel: Parcel) -> None:
        """Hand rows (sorted by target rank, as `parcel` tells) to the lane; this rank's own stay here.

        Others get them in the precision of the exchange.
        """
        layer_map = self._maps[action.layer]
        if layer_map.keeps(action.micro_batch):
            self._kept[action] = rows, parcel
        self._clock.sent(action)
        self._lanes.put(action, _in(self._parts.exchange, rows), parcel)

    def cross(self, action: Action, hidden: Tensor) -> None:
        """Hand [B, S, H] to the lane that brings it to another pipeline stage, or to the head; some may stay here."""
        rows, parcel = hidden.flatten(0, 1), self._carrier.crossing(action)
        if parcel.sizes[self._mesh.rank]:
            self._kept[action] = rows, parcel
        self._clock.sent(action)
        self._lanes.put(action, _in(self._parts.exchange, rows), parcel)

    def room(self, action: Action, rows: int) -> Tensor | None:
        """[rows, H] to write in what `action` will send, where that saves a copy."""
        if self._parts.exchange != self._parts.dtype:
            return None
        return self._lanes.room(action, rows, self._carrier.empty(action))

    def wide(self, action: Action, rows: int) -> Tensor:
        """[rows, H + tail] to write in what a dispatch will send."""
        room, width = self.room(action, rows), self._carrier.empty(action).shape[1]
        return torch.empty(rows, width, dtype=self._parts.dtype, device=self._mesh.device) if room is None else room

    def receive(self, action: Action) -> tuple[Tensor, Any]:
        """Rows of `action` by source rank, this rank's own among them, and when they arrived.

        The task that needs them begins here, as the simulator has it: what it does to take them in is its own work.
        """
        handoff = self._lanes.get(action)
        kept = self._kept.pop(action, None)
        if handoff is None:
            self.began = self._clock.mark()
            assert kept is not None
            if has_counts(action):
                self._carrier.stays((action.layer, action.micro_batch))
            own = self._own(*kept)  # perhaps in a room, which experts would hold until backward
            return (own.clone() if self._mesh.mail and has_counts(action) else own), 0.0
        handoff.wait()
        self.began = self._clock.mark()
        rows = _in(self._parts.dtype, handoff.whole())
        if kept is not None and len(own := self._own(*kept)):
            start = sum(self._carrier.incoming(action)[: self._mesh.rank])
            rows[start : start + len(own)] = own
        return rows, handoff.end

    def _own(self, rows: Tensor, parcel: Parcel) -> Tensor:
        """What of `rows` stays on this rank."""
        start = sum(parcel.sizes[: self._mesh.rank])
        return rows[start : start + parcel.sizes[self._mesh.rank]]


def _in(dtype: torch.dtype, rows: Tensor) -> Tensor:
    """`rows` in a precision; `Tensor.to` takes 10 us to do nothing between two large tasks."""
    return rows if rows.dtype == dtype else rows.to(dtype)
