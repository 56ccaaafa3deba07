"""Lanes: threads of a rank that carry its transfers of one kind each, in the schedule's static order: towards the
experts, from them, collectives.

Nothing is tagged: every message has its exact size, and all ranks post the messages of a lane in one order, which is
what NCCL demands and gloo allows. NCCL also wants one order over the communicators: there the lanes take turns to
call, in the schedule's order. On CUDA each lane has a stream of its own; events order it against the compute stream.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hetermoe_cli.model.copies import used_here
from hetermoe_cli.runtime.mesh import Mesh, peer_errors
from hetermoe_cli.schedule.action import Action
from hetermoe_cli.schedule.schedule import Schedule

LANES = 3


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

    def take(self) -> Tensor:
        """Use the rows on the current stream."""
        if self.ready is not None:
            torch.cuda.current_stream(self.rows.device).wait_event(self.ready)
        return used_here(self.rows)


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


Works = list[dist.Work]
Moves = Generator[Works, None, Handoff]  # yields what has been posted and must be done before it can go on
Carry = Callable[[Action, Tensor | None, Parcel | None], Moves]


@dataclass
class Begun:
    """A transfer that the compute thread has begun."""

    moves: Moves
    works: Works


Job = tuple[Action, "Future[Outgoing | Begun] | None", "Future[Handoff]"]


class Lanes:
    """Runs one schedule's transfers in the background; the compute thread puts what it sends and gets what came.

    A message is dropped as soon as it is sent or taken: memory holds those in flight, not those of the iteration. On a
    CPU a compute thread that would wait next posts itself what an idle lane waits for: waking that takes longer.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._pool = ThreadPoolExecutor(LANES, thread_name_prefix="lane")
        self._streams = [_stream(mesh.device) for _ in range(LANES)]
        self._rank, self._ordered = mesh.rank, mesh.ordered
        self._posts = mesh.device.type == "cpu" and not mesh.ordered  # the compute thread would wait for its turn
        self._turns: Turns | None = None
        self._outbox: dict[Action, Future[Outgoing | Begun]] = {}
        self._inbox: dict[Action, Future[Handoff]] = {}
        self._awaited: set[Action] = set()  # what lanes came to before it was put
        self._running: list[Future[None]] = []

    def start(self, schedule: Schedule, carry: Carry) -> None:
        """Begin a pass. `carry` moves one transfer: (action, rows to send or None, their sizes) -> what came."""
        mine = schedule.transfers_of(self._rank)
        self._carry, self._awaited = carry, set()
        self._outbox = {action: Future() for action in mine if self._rank in schedule.senders[action]}
        self._inbox = {action: Future() for action in mine if self._rank in schedule.receivers[action]}
        self._turns = Turns(mine) if self._ordered else None
        self._running = []
        for lane, stream in enumerate(self._streams, 1):
            actions = [action for action in mine if action.lane == lane]
            jobs = deque((a, self._outbox.get(a), self._inbox.get(a, Future())) for a in actions)
            self._running.append(self._pool.submit(self._work, jobs, stream))

    def put(
        self, action: Action, rows: Tensor, parcel: Parcel | None, idle: Callable[[], bool] = lambda: False
    ) -> None:
        """Send rows when the lane gets to `action`; nothing happens if this rank sends nothing in it.

        `idle`: whether this thread has nothing else to do.
        """
        if action not in self._outbox:
            return
        outgoing = self._outbox.pop(action)
        if self._posts and action in self._awaited and idle():
            try:
                moves = self._carry(action, rows, parcel)
                outgoing.set_result(Begun(moves, next(moves)))
            except BaseException as error:
                outgoing.set_exception(error)
                raise
        else:
            outgoing.set_result(Outgoing(Handoff.of(rows), parcel))

    def here(self, action: Action) -> bool:
        """Whether nobody would have to wait for what `action` brings to this rank."""
        return action not in self._inbox or self._inbox[action].done()

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
        if self._turns:
            self._turns.abort()

    def _work(self, jobs: "deque[Job]", stream: "torch.cuda.Stream | None") -> None:
        context: Any = torch.cuda.stream(stream) if stream is not None else nullcontext()
        with context:
            while jobs:
                action, outgoing, incoming = jobs.popleft()
                try:
                    self._awaited.add(action)
                    begun = self._begin(action, outgoing.result() if outgoing else None)
                    with self._turns.turn(action) if self._turns else nullcontext():
                        incoming.set_result(_end(begun))
                except BaseException as error:
                    if self._turns:
                        self._turns.abort()
                    for future in (incoming, *(job[2] for job in jobs)):  # nobody else sets this lane's futures
                        future.set_exception(error)
                    raise
                del outgoing, incoming, begun

    def _begin(self, action: Action, out: Outgoing | Begun | None) -> Begun:
        """A transfer whose rows, if it has any, are there."""
        if isinstance(out, Begun):
            return out
        rows, parcel = (out.handoff.take(), out.parcel) if out else (None, None)
        return Begun(self._carry(action, rows, parcel), [])


def _end(begun: Begun) -> Handoff:
    """Wait for what a transfer has posted until it has all that it brings."""
    moves, works = begun.moves, begun.works
    try:
        while True:
            with peer_errors():
                for work in works:
                    work.wait()
            works = next(moves)
    except StopIteration as done:
        handoff: Handoff = done.value
        return handoff


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


def _stream(device: torch.device) -> "torch.cuda.Stream | None":
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def post(group: dist.ProcessGroup, sends: dict[int, Tensor], receives: dict[int, Tensor]) -> Works:
    """Post one batch of messages by the ranks of `group`; empty ones are skipped, as the other side does."""
    operations = [
        dist.P2POp(dist.isend, tensor, group=group, group_peer=peer)
        for peer, tensor in sorted(sends.items())
        if tensor.numel()
    ]
    operations += [
        dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer)
        for peer, tensor in sorted(receives.items())
        if tensor.numel()
    ]
    with peer_errors():
        return dist.batch_isend_irecv(operations) if operations else []
