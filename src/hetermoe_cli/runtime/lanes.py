"""Lanes: threads of a rank that carry its transfers of one kind each, in the schedule's static order: towards the
experts, from them, gradients.

Nothing is tagged: every message has its exact size, and all ranks post the messages of a lane in one order, which is
what NCCL demands and gloo allows. On CUDA each lane has a stream of its own; events order it against the compute
stream.
"""

from collections import deque
from collections.abc import Callable
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

LANES = 3


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


@dataclass
class Outgoing:
    """Rows for one transfer, sorted by target rank, `sizes` for each."""

    handoff: Handoff
    sizes: list[int]


Carrier = Callable[[Action, Tensor | None, list[int]], Handoff]
Job = tuple[Action, "Future[Outgoing] | None", "Future[Handoff]"]


class Lanes:
    """Runs one schedule's transfers in the background; the compute thread puts what it sends and gets what came.

    A message is dropped as soon as it is sent or taken: memory holds those in flight, not those of the iteration.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._pool = ThreadPoolExecutor(LANES, thread_name_prefix="lane")
        self._streams = [_stream(mesh.device) for _ in range(LANES)]
        self._rank = mesh.rank
        self._outbox: dict[Action, Future[Outgoing]] = {}
        self._inbox: dict[Action, Future[Handoff]] = {}
        self._running: list[Future[None]] = []

    def start(self, schedule: Schedule, carrier: Carrier) -> None:
        """Begin a pass. `carrier` moves one transfer: (action, rows to send or None, their sizes) -> what came."""
        mine = schedule.transfers_of(self._rank)
        self._outbox = {action: Future() for action in mine if self._rank in schedule.senders[action]}
        self._inbox = {action: Future() for action in mine if self._rank in schedule.receivers[action]}
        self._running = []
        for lane, stream in enumerate(self._streams, 1):
            actions = [action for action in mine if action.lane == lane]
            jobs = deque((a, self._outbox.get(a), self._inbox.get(a, Future())) for a in actions)
            self._running.append(self._pool.submit(self._work, jobs, stream, carrier))

    def put(self, action: Action, rows: Tensor, sizes: list[int]) -> None:
        """Send rows when the lane gets to `action`; nothing happens if this rank sends nothing in it."""
        if action in self._outbox:
            self._outbox.pop(action).set_result(Outgoing(Handoff.of(rows), sizes))

    def get(self, action: Action) -> Handoff | None:
        """Wait for what `action` brings to this rank; None if this rank receives nothing in it."""
        return self._inbox.pop(action).result() if action in self._inbox else None

    def finish(self) -> None:
        """Wait for all lanes, so that every sent tensor is out; raises what a lane raised."""
        for lane in self._running:
            lane.result()

    def abort(self, error: BaseException) -> None:
        """Wake lanes that wait for rows which will never come."""
        for future in self._outbox.values():
            future.set_exception(error)
        self._outbox = {}

    @staticmethod
    def _work(jobs: "deque[Job]", stream: "torch.cuda.Stream | None", carrier: Carrier) -> None:
        context: Any = torch.cuda.stream(stream) if stream is not None else nullcontext()
        with context:
            while jobs:
                action, outgoing, incoming = jobs.popleft()
                try:
                    out = outgoing.result() if outgoing else None
                    incoming.set_result(
                        carrier(action, out.handoff.take(), out.sizes) if out else carrier(action, None, [])
                    )
                except BaseException as error:
                    for future in (incoming, *(job[2] for job in jobs)):  # nobody else sets this lane's futures
                        future.set_exception(error)
                    raise
                del outgoing, incoming, out


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
