"""Lanes: two threads a rank that carry the transfers of one direction each, in the schedule's static order.

Nothing is tagged: every message has its exact size, and all ranks post the messages of a lane in one order, which is
what NCCL demands and gloo allows. On CUDA each lane has a stream of its own; events order it against the compute
stream, which never waits for a token count.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hetermoe_cli.runtime.mesh import Mesh, peer_errors
from hetermoe_cli.schedule.action import Action
from hetermoe_cli.schedule.schedule import Schedule


@dataclass
class Handoff:
    """A tensor that crosses between the compute stream and a lane; `ready` orders the two on CUDA.

    `start` and `end` are when the transfer ran, seconds on the monotonic clock.
    """

    rows: Tensor
    ready: Any = None
    start: float = 0.0
    end: float = 0.0

    @classmethod
    def of(cls, rows: Tensor) -> "Handoff":
        """Hand over rows produced on the current stream."""
        return cls(rows, torch.cuda.current_stream().record_event() if rows.is_cuda else None)

    def take(self) -> Tensor:
        """Use the rows on the current stream."""
        if self.ready is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.ready)
            self.rows.record_stream(stream)
        return self.rows


Carrier = Callable[[Action, Tensor | None], Handoff]


class Lanes:
    """Runs one schedule's transfers in the background; the compute thread puts what it sends and gets what came."""

    def __init__(self, mesh: Mesh) -> None:
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="lane")
        self._streams = [_stream(mesh.device) for _ in range(2)]
        self._rank = mesh.rank
        self._outbox: dict[Action, Future[Handoff]] = {}
        self._inbox: dict[Action, Future[Handoff]] = {}
        self._running: list[Future[None]] = []

    def start(self, schedule: Schedule, carrier: Carrier) -> None:
        """Begin a pass. `carrier` moves one transfer: (action, rows to send or None) -> what came."""
        mine = schedule.transfers_of(self._rank)
        self._outbox = {action: Future() for action in mine if self._rank in schedule.senders[action]}
        self._inbox = {action: Future() for action in mine}
        lanes = [[a for a in mine if a.towards_experts], [a for a in mine if not a.towards_experts]]
        self._running = [
            self._pool.submit(self._work, lane, stream, carrier)
            for lane, stream in zip(lanes, self._streams, strict=True)
        ]

    def put(self, action: Action, rows: Tensor) -> bool:
        """Send rows when the lane gets to `action`; False if the schedule has no such transfer for this rank."""
        if action not in self._outbox:
            return False
        self._outbox[action].set_result(Handoff.of(rows))
        return True

    def get(self, action: Action) -> Handoff | None:
        """Wait for what `action` brought to this rank; None if the schedule has no such transfer for it."""
        return self._inbox[action].result() if action in self._inbox else None

    def finish(self) -> None:
        """Wait for both lanes, so that every sent tensor is out; raises what a lane raised."""
        for lane in self._running:
            lane.result()

    def abort(self, error: BaseException) -> None:
        """Wake lanes that wait for rows which will never come."""
        for future in self._outbox.values():
            if not future.done():
                future.set_exception(error)

    def _work(self, actions: Iterable[Action], stream: "torch.cuda.Stream | None", carrier: Carrier) -> None:
        context: Any = torch.cuda.stream(stream) if stream is not None else nullcontext()
        with context:
            for action in actions:
                try:
                    outgoing = self._outbox[action].result() if action in self._outbox else None
                    self._inbox[action].set_result(carrier(action, outgoing.take() if outgoing else None))
                except BaseException as error:
                    for future in self._inbox.values():
                        if not future.done():
                            future.set_exception(error)
                    raise


def _stream(device: torch.device) -> "torch.cuda.Stream | None":
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def exchange(group: dist.ProcessGroup, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
    """Move one batch of messages and wait; empty tensors are skipped, as the other side skips them too."""
    operations = [
        dist.P2POp(dist.isend, tensor, peer, group) for peer, tensor in sorted(sends.items()) if tensor.numel()
    ]
    operations += [
        dist.P2POp(dist.irecv, tensor, peer, group) for peer, tensor in sorted(receives.items()) if tensor.numel()
    ]
    if operations:
        with peer_errors():
            for work in dist.batch_isend_irecv(operations):
                work.wait()
