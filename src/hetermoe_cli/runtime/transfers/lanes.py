"""Lanes: threads of a rank that carry its transfers of one kind each, in the schedule's static order: towards the
experts, from them, collectives, to other pipeline stages, from these.

Nothing is tagged: every message has its exact size, and all ranks post the messages of a lane in one order, which is
what NCCL demands and gloo allows. NCCL also wants one order over the communicators: there the lanes take turns to
call (turns.py). On CUDA each lane has a stream of its own; events order it against the compute stream.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hetermoe_cli.model.copies import used_here
from hetermoe_cli.runtime.machine.mesh import Mesh
from hetermoe_cli.runtime.machine.peers import peer_errors
from hetermoe_cli.schedule.action import Action
from hetermoe_cli.schedule.schedule import Schedule

LANES, COLLECTIVES = 5, 3


@dataclass
class Handoff:
    """A tensor that crosses between the compute stream and a lane; `ready` orders the two on CUDA.

    `start` and `end` are when the transfer ran, marks of the clock.
    """

    rows: Tensor
    ready: Any = None
    start: Any = 0.0
    end: Any = 0.0

    @classmethod
    def of(cls, rows: Tensor) -> "Handoff":
        """Hand over rows produced on the current stream."""
        return cls(rows, torch.cuda.current_stream(rows.device).record_event() if rows.is_cuda else None)

    def wait(self) -> None:
        """Let the current stream wait for the rows."""
        if self.ready is not None:
            torch.cuda.current_stream(self.rows.device).wait_event(self.ready)

    def whole(self) -> Tensor:
        """The rows, once they are there."""
        return used_here(self.rows)

    def take(self) -> Tensor:
        """Use the rows on the current stream."""
        self.wait()
        return self.whole()


class Parcel(Protocol):
    """What knows how many rows go to each rank; asking may wait for the device."""

    @property
    def sizes(self) -> list[int]:
        """Rows by rank."""


@dataclass
class Outgoing:
    """Rows for one transfer, sorted by target rank as `parcel` tells; None of a collective."""

    handoff: Handoff
    parcel: Parcel | None


Carry = Callable[[Action, Tensor | None, Parcel | None], Handoff]
Job = tuple[Action, "Future[Outgoing] | None", "Future[Handoff]"]


class Lane(Protocol):
    """Transfers of one kind that need no thread."""

    def room(self, action: Action, rows: int, like: Tensor) -> Tensor | None:
        """Where to write what will be sent, if that saves a copy."""

    def put(self, action: Action, rows: Tensor, parcel: Parcel | None) -> None:
        """Send rows."""

    def get(self, action: Action) -> Handoff | None:
        """Wait for what came."""

    def release(self) -> None:
        """Give back what was taken and is not used any more."""


class Lanes:
    """Runs one schedule's transfers in the background; the compute thread puts what it sends and gets what came.

    A message is dropped as soon as it is sent or taken: memory holds those in flight, not those of the iteration.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._pool = ThreadPoolExecutor(LANES, "lane", _work_on, (mesh.device,))
        self._streams = [_stream(mesh.device, lane) for lane in range(1, LANES + 1)]
        self._rank, self._ordered = mesh.rank, mesh.ordered
        self._turns: Turns | None = None
        self._outbox: dict[Action, Future[Outgoing]] = {}
        self._inbox: dict[Action, Future[Handoff]] = {}
        self._running: list[Future[None]] = []

    def start(self, schedule: Schedule, carry: Carry, direct: Mapping[int, Lane]) -> None:
        """Begin a pass. `carry` moves one transfer: (action, rows to send or None, their sizes) -> what came; `direct`:
        those of these lanes are moved by them."""
        self._direct = direct
        mine = [action for action in schedule.transfers_of(self._rank) if action.lane not in direct]
        self._outbox = {action: Future() for action in mine if self._rank in schedule.senders[action]}
        self._inbox = {action: Future() for action in mine if self._rank in schedule.receivers[action]}
        self._turns = Turns(mine) if self._ordered else None
        self._running = []
        for lane, stream in enumerate(self._streams, 1):
            actions = [action for action in mine if self._lane(schedule, action) == lane]
            jobs = deque((a, self._outbox.get(a), self._inbox.get(a, Future())) for a in actions)
            if jobs:
                self._running.append(self._pool.submit(self._work, jobs, stream, carry))

    def _lane(self, schedule: Schedule, action: Action) -> int:
        sends, receives = schedule.lanes_of(action)
        return sends if self._rank in schedule.senders[action] else receives

    def room(self, action: Action, rows: int, like: Tensor) -> Tensor | None:
        """[rows, H] like `like` to write in what `action` will send, where that saves a copy."""
        return self._direct[action.lane].room(action, rows, like) if action.lane in self._direct else None

    def put(self, action: Action, rows: Tensor, parcel: Parcel | None) -> None:
        """Send rows when the lane gets to `action`; nothing happens if this rank sends nothing in it."""
        if action.lane in self._direct:
            self._direct[action.lane].put(action, rows, parcel)
            for lane in self._direct.values():
                lane.release()
        elif action in self._outbox:
            self._outbox.pop(action).set_result(Outgoing(Handoff.of(rows), parcel))

    def get(self, action: Action) -> Handoff | None:
        """Wait for what `action` brings to this rank; None if this rank receives nothing in it."""
        if action.lane in self._direct:
            return self._direct[action.lane].get(action)
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
        if self._turns:
            self._turns.abort()

    def _work(self, jobs: "deque[Job]", stream: "torch.cuda.Stream | None", carry: Carry) -> None:
        context: Any = torch.cuda.stream(stream) if stream is not None else nullcontext()
        with context:
            while jobs:
                action, outgoing, incoming = jobs.popleft()
                try:
                    out = outgoing.result() if outgoing else None
                    rows, parcel = (out.handoff.take(), out.parcel) if out else (None, None)
                    with self._turns.turn(action) if self._turns else nullcontext():
                        incoming.set_result(carry(action, rows, parcel))
                except BaseException as error:
                    if self._turns:
                        self._turns.abort()
                    for future in (incoming, *(job[2] for job in jobs)):  # nobody else sets this lane's futures
                        future.set_exception(error)
                    raise
                del outgoing, incoming, out, rows


class Turns:
    """One static order over the lanes of a rank: each transfer is called after all before it have been."""

    def __init__(self, order: Sequence[Action]) -> None:
        self._left = deque(order)
        self._changed = threading.Condition()
        self._aborted = False

    @contextmanager
    def turn(self, action: Action) -> Iterator[None]:
        """Wait for the turn of `action`, and pass it on at the end; an error if the pass was aborted."""
        with self._changed:
            self._changed.wait_for(lambda: self._aborted or self._left[0] == action)
            if self._aborted:
                raise RuntimeError(f"transfer {action}: another lane failed")
        yield
        with self._changed:
            self._left.popleft()
            self._changed.notify_all()

    def abort(self) -> None:
        """Wake all that wait."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()


def _work_on(device: torch.device) -> None:
    """In a new thread, whose device is card 0 whatever its process chose: setting that again after a pass would take
    half a gigabyte there for a context."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _stream(device: torch.device, lane: int) -> "torch.cuda.Stream | None":
    """Its kernels go ahead of compute kernels that have not begun, as ranks wait for rows; not those of collectives."""
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device, priority=0 if lane == COLLECTIVES else -1)  # type: ignore[no-untyped-call]


def exchange(group: dist.ProcessGroup, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
    """Post one batch of messages by the ranks of `group` and wait for it; empty ones are skipped, as the other side
    does.

    Receives go first: gloo tells the peer of each on the connection that carries its own rows, so behind these the peer
    would begin to send only when all of them are out, and one direction of the link would wait for the other.
    """
    operations = [
        dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer)
        for peer, tensor in sorted(receives.items())
        if tensor.numel()
    ]
    operations += [
        dist.P2POp(dist.isend, tensor, group=group, group_peer=peer)
        for peer, tensor in sorted(sends.items())
        if tensor.numel()
    ]
    with peer_errors():
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
