"""The communication calls of an iteration, rank by rank, derived from the schedule before anything runs. No torch.

NCCL neither tags messages nor checks them: it pairs what two ranks call by position, and hangs where positions differ
or where two communicators are entered in different orders. So every rank's list is derived and compared beforehand.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

from hetermoe_cli import __version__
from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.schedule.schedule import Schedule, is_whole
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.world import Replica, World

# by an action's lane
COMMUNICATORS = ("world", "to experts", "from experts", "attending", "to next stage", "to stage before")
PARITY = ("even", "odd")  # of a border between pipeline stages
COUNTS = "int64"
WIDEST = "widest"  # of the attending ranks' precisions

Operation = Literal["send", "receive", "all-reduce", "reduce-scatter", "all-gather"]  # gloo: scatters by an all-to-all
Payload = Literal["counts", "rows", "gradients", "figures", "weights"]


class Call(NamedTuple):
    """One call of one rank. Neighbours of one `batch` are issued together.

    Ranks are processes. `peer`: the other rank of a message, -1 for a collective, whose `members` are all that enter
    it; `size`: elements, None where tokens decide (a message of none is left out by both of its ranks).
    """

    communicator: str
    action: Action
    payload: Payload
    operation: Operation
    peer: int
    dtype: str
    size: int | None = None
    members: tuple[int, ...] = ()

    @property
    def batch(self) -> "Batch":
        """What is issued at once; the same on all ranks that take part."""
        return Batch(self.communicator, self.action, self.payload)

    @property
    def content(self) -> tuple[Action, Payload, str, int | None]:
        """What both ends of a message must agree on."""
        return self.action, self.payload, self.dtype, self.size


class Batch(NamedTuple):
    """A group of calls that ranks enter together."""

    communicator: str
    action: Action
    payload: Payload

    def __str__(self) -> str:
        return f"{self.action} {self.payload} ({self.communicator})"


Calls = list[Call]


def calls_of(schedule: Schedule, world: Layout | World, process: int, exchange: str) -> Calls:
    """What a process calls in one iteration, in its one order over all communicators; rows travel in `exchange`.

    `schedule` is that of its copy.
    """
    world = World.of(world)
    number, rank = world.seat(process)
    calls: Calls = []
    layout = world.replicas[number].layout
    for action in schedule.transfers_of(rank):
        if action.is_collective:
            calls += _collectives(world, action, layout, process, exchange)
            continue
        if has_counts(action):
            calls += _messages(schedule, action, (world, process), "counts", COUNTS, layout)
        calls += _messages(schedule, action, (world, process), "rows", exchange)
    for action in schedule.compute[rank]:
        if action.kind is Kind.SYNCHRONISE:
            everyone = tuple(range(world.size))
            calls.append(Call(COMMUNICATORS[0], action, "figures", "all-reduce", -1, "float64", members=everyone))
    return calls


def _news(world: World, action: Action, process: int) -> Iterator[Call]:
    """All-gathers of one layer's weights among those that share out their states."""
    for holders in _summed(world, action.layer, process, world.shares_dense_states) if world.shares_states else ():
        yield Call(share_name(world, holders), action, "weights", "all-gather", -1, WIDEST, members=holders)


def _collectives(world: World, action: Action, layout: Layout, process: int, exchange: str) -> Iterator[Call]:
    """Of a gather or a reduction."""
    replica = world.replica_of(process)
    alone, whole = len(world.replicas) == 1, is_whole(action, layout.micro_batches)
    if action.kind is Kind.GATHER:
        if layout.gathers and process in replica.attending:
            yield _of_attending(world, replica)(action, "weights", "all-gather", dtype=WIDEST)
        if whole:
            yield from _news(world, action, process)
        return
    if layout.gathers and (alone or not whole):
        yield _of_attending(world, replica)(action, "gradients", "reduce-scatter", dtype=exchange)
    if whole:
        # copies may differ in their micro-batches, not in the order of layers; what one copy scatters keeps its name
        summed = action if alone else action._replace(micro_batch=0)
        yield from _sums(world, summed, process, exchange, dense=not (layout.gathers and alone))


def _of_attending(world: World, replica: Replica | None = None) -> "partial[Call]":
    """A collective of all attending processes, or of one copy's."""
    members = tuple(replica.attending) if replica else world.attending
    return partial(Call, share_name(world, members), peer=-1, members=members)


def _sums(world: World, action: Action, process: int, exchange: str, dense: bool) -> Iterator[Call]:
    """Sums of one layer's gradients: scattered where states are shared out, but for a fully sharded dense part's, which
    groups cut on their own."""
    attending = world.attending_at(action.layer)
    for holders in _summed(world, action.layer, process, dense):
        whole = not world.shares_states or (dense and holders == attending and not world.shares_dense_states)
        operation: Operation = "all-reduce" if whole else "reduce-scatter"
        yield Call(share_name(world, holders), action, "gradients", operation, -1, exchange, members=holders)


def _summed(world: World, layer: int, process: int, dense: bool) -> Iterator[tuple[int, ...]]:
    """The holders of what of a layer a process shares with others, set by set; `dense`: of the dense part too."""
    for share in world.shares(layer):
        if process in share.holders and len(share.holders) > 1 and (share.experts or dense):
            yield share.holders


def share_name(world: World, holders: tuple[int, ...]) -> str:
    """The communicator of processes that hold the same parameters, or attend in one copy."""
    if holders == world.attending:
        return COMMUNICATORS[3]
    within = [number for number, replica in enumerate(world.replicas) if holders == tuple(replica.attending)]
    return lane_name(world, within[0], 3) if within else f"holders {', '.join(map(str, holders))}"


def lane_name(world: World, number: int, lane: int) -> str:
    """The communicator of one direction in a copy."""
    return COMMUNICATORS[lane] + (f", group {number}" if len(world.replicas) > 1 else "")


def has_counts(action: Action) -> bool:
    """Whether a count vector goes ahead of the rows: all other sizes of an iteration follow from these."""
    return action.kind is Kind.DISPATCH and action.direction is Pass.FORWARD


def _messages(
    schedule: Schedule,
    action: Action,
    seat: tuple[World, int],
    payload: Payload,
    dtype: str,
    counted: Layout | None = None,
) -> Iterator[Call]:
    """Receives by peer, then sends by peer, of a process in its world. `counted`: count vectors, one number for each
    expert of the receiver, and where rows go once per device how many these are."""
    world, process = seat
    number, rank = world.seat(process)
    layout, processes = world.replicas[number].layout, world.replicas[number].processes
    name = lane_name(world, number, action.lane)
    if action.kind is Kind.CROSS:
        name += f", {PARITY[layout.border(action.layer) % 2]}"
    senders, receivers = schedule.senders[action], schedule.receivers[action]
    directions: list[tuple[Operation, tuple[int, ...], tuple[int, ...]]] = [
        ("receive", receivers, senders),
        ("send", senders, receivers),
    ]
    for operation, own, others in directions:
        for peer in sorted(others) if rank in own else ():
            pair = (rank, peer) if (operation == "send") == (action.direction is Pass.FORWARD) else (peer, rank)
            if peer != rank and (action.is_exchange or layout.cross(action.layer, *pair, action.micro_batch)):
                host = peer if operation == "send" else rank
                size = counted.numbers_ahead(action.layer, host) if counted else None
                yield Call(name, action, payload, operation, processes[peer], dtype, size)


def digest(schedules: Sequence[Schedule], world: Layout | World, exchange: str) -> int:
    """63 bits of a sha256 over all that the ranks' lists are derived from: equal means equal lists."""
    copies = [f"{r.layout.model_dump_json()} on {list(r.processes)}" for r in World.of(world).replicas]
    text = "\n".join([__version__, *map(str, schedules), *copies, exchange])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def check_agreement(digests: Sequence[int]) -> None:
    """UserError if a rank derived other lists than rank 0; `digests` by rank."""
    for rank, found in enumerate(digests):
        if found != digests[0]:
            raise UserError(
                f"rank {rank} derives other communication calls from its run.yaml than rank 0: start all workers "
                "from one run.yaml and one version of hetermoe"
            )
