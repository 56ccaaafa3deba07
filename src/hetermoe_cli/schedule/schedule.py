"""Schedule: the order of every rank's compute tasks and the order of the transfers between them, as data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.spec.layout import Layout


@dataclass(frozen=True, eq=False)  # told apart by what they are, not by what is in them: caches ask all the time
class Schedule:
    """One iteration.

    `compute[r]` is rank r's compute order. `transfers` is one static order over all transfers: of two that share a
    NIC direction, the earlier one goes first; `senders` and `receivers` say who takes part. `after`: the task whose end
    frees the memory that a gather needs. `lasts`: where ranks attend to some micro-batches only, those after which
    some of them are done with a layer, ascending.
    """

    compute: tuple[tuple[Action, ...], ...]
    transfers: tuple[Action, ...]
    senders: dict[Action, tuple[int, ...]]
    receivers: dict[Action, tuple[int, ...]]
    after: dict[Action, Action] = field(default_factory=dict)
    lasts: tuple[int, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.compute)

    def transfers_of(self, rank: int) -> list[Action]:
        """The transfers that `rank` takes part in, in order."""
        return [t for t in self.transfers if rank in self.senders[t] or rank in self.receivers[t]]

    def lanes_of(self, transfer: Action) -> tuple[int, int]:
        """The lane (Action.lane) that a transfer takes on its senders, and on its receivers.

        Between pipeline stages the two differ: what a rank waits for must not hold up what it sends.
        """
        return (4, 5) if transfer.kind is Kind.CROSS else (transfer.lane, transfer.lane)

    def sources(self, transfer: Action, layers: int) -> tuple[Action, ...]:
        """Tasks that its senders must have done, where they have them, before they take part in it."""
        if transfer.kind is Kind.REDUCE:
            ends = {*self.lasts, transfer.micro_batch}
            made = tuple([task for j in sorted(ends) for task in completions(transfer._replace(micro_batch=j), layers)])
        else:
            made = inputs(transfer, layers)
        first = self.after.get(transfer)
        return (*made, first) if first else made

    def needs(self, task: Action, layers: int) -> tuple[Action, ...]:
        """What a compute task needs, where the schedule has it: `inputs`. A rank may attend to later micro-batches
        only, while new weights come with the first."""
        found = inputs(task, layers)
        if not self.lasts or not found or found[-1].kind is not Kind.GATHER:
            return found
        return (*found[:-1], found[-1]._replace(micro_batch=0))

    def __str__(self) -> str:
        """Text form: a line per rank, then a line per transfer with its senders and receivers and what it follows."""
        lines = [f"rank {rank}: {' '.join(map(str, order))}".rstrip() for rank, order in enumerate(self.compute)]
        for transfer in self.transfers:
            senders = ",".join(map(str, self.senders[transfer]))
            receivers = ",".join(map(str, self.receivers[transfer]))
            first = f" after {self.after[transfer]}" if transfer in self.after else ""
            lines.append(f"transfer {transfer}: {senders} > {receivers}{first}")
        return "\n".join(lines) + "\n"


_FORWARD, _BACKWARD = Pass.FORWARD, Pass.BACKWARD
_SOURCES = {  # the task that one of layer l needs, and its layer's distance from l
    (Kind.ATTENTION, _FORWARD): (Kind.COMBINE, _FORWARD, -1),
    (Kind.DISPATCH, _FORWARD): (Kind.ATTENTION, _FORWARD, 0),
    (Kind.EXPERT, _FORWARD): (Kind.DISPATCH, _FORWARD, 0),
    (Kind.COMBINE, _FORWARD): (Kind.EXPERT, _FORWARD, 0),
    (Kind.COMBINE, _BACKWARD): (Kind.ATTENTION, _BACKWARD, 1),
    (Kind.EXPERT, _BACKWARD): (Kind.COMBINE, _BACKWARD, 0),
    (Kind.DISPATCH, _BACKWARD): (Kind.EXPERT, _BACKWARD, 0),
    (Kind.ATTENTION, _BACKWARD): (Kind.DISPATCH, _BACKWARD, 0),
    (Kind.PASS, _FORWARD): (Kind.COMBINE, _FORWARD, -1),
    (Kind.CROSS, _FORWARD): (Kind.PASS, _FORWARD, 0),
    (Kind.CROSS, _BACKWARD): (Kind.ATTENTION, _BACKWARD, 0),
    (Kind.PASS, _BACKWARD): (Kind.CROSS, _BACKWARD, 0),
}


@lru_cache(maxsize=65536)
def inputs(action: Action, layers: int) -> tuple[Action, ...]:
    """Tasks whose results `action` needs, where the schedule has them (source: arXiv 2504.03871).

    Order on one rank's compute stream is not repeated here: the schedule's order implies it.
    """
    kind, direction, layer, micro_batch = action
    if kind is Kind.GATHER:
        return ()
    if kind is Kind.REDUCE:
        return completions(action, layers)[-1:]
    if kind is Kind.HEAD:
        combined = Action(Kind.COMBINE, _FORWARD, layers - 1, micro_batch)
        return (combined, Action(Kind.CROSS, _FORWARD, layers, micro_batch), gather_for(action, layers))
    if kind is Kind.CROSS and direction is _BACKWARD and layer == layers:
        return (Action(Kind.HEAD, _BACKWARD, 0, micro_batch),)
    if kind is Kind.COMBINE and direction is _BACKWARD and layer == layers - 1:
        return (Action(Kind.HEAD, _BACKWARD, 0, micro_batch), Action(Kind.PASS, _BACKWARD, layers, micro_batch))
    if (kind, direction) not in _SOURCES:
        return ()
    of, way, distance = _SOURCES[kind, direction]
    rows = (Action(of, way, layer + distance, micro_batch),) if layer + distance >= 0 else ()
    if kind is Kind.ATTENTION and direction is _FORWARD and layer:  # where a pipeline stage begins
        rows = (*rows, Action(Kind.CROSS, _FORWARD, layer, micro_batch))
    elif kind is Kind.COMBINE and direction is _BACKWARD:  # where one ends
        rows = (*rows, Action(Kind.PASS, _BACKWARD, layer + 1, micro_batch))
    weighs = kind is Kind.ATTENTION or (kind, direction) == (Kind.EXPERT, _FORWARD)
    return (*rows, gather_for(action, layers)) if weighs else rows


def completions(reduce: Action, layers: int) -> tuple[Action, ...]:
    """Tasks that complete the gradients of an R: of a rank that hosts only, that of its experts; else the last one."""
    _, _, layer, micro_batch = reduce
    if layer == layers:
        return (Action(Kind.HEAD, _BACKWARD, 0, micro_batch),)
    return tuple(Action(kind, _BACKWARD, layer, micro_batch) for kind in (Kind.EXPERT, Kind.ATTENTION))


def segment_of(stage: Action, layers: int) -> int:
    """Whose weights a compute task needs: its layer's, or, one after the last layer, the head's."""
    return layers if stage.kind is Kind.HEAD else stage.layer


def gather_for(stage: Action, layers: int) -> Action:
    """What brings the weights that a compute task needs, if they are gathered for this one."""
    direction = _FORWARD if stage.kind is Kind.HEAD else stage.direction
    return Action(Kind.GATHER, direction, segment_of(stage, layers), stage.micro_batch)


def is_whole(collective: Action, micro_batches: int) -> bool:
    """Whether a collective moves all that is shared of its layer, experts too, which it does once an iteration:
    gradients with the last micro-batch, new weights with the first. Others move a fully sharded dense part only."""
    _, direction, _, micro_batch = collective
    if collective.kind is Kind.REDUCE:
        return micro_batch == micro_batches - 1
    return direction is _FORWARD and not micro_batch


def is_of_all(transfer: Action, layout: Layout, copies: Sequence[Layout]) -> bool:
    """Whether all copies of the model, of which `layout` is one, do a transfer together: sums of gradients, and gathers
    of new weights of what all of them share out."""
    if len(copies) < 2 or not transfer.is_collective or not is_whole(transfer, layout.micro_batches):
        return False
    states = {copy.schedule.dense_state for copy in copies}
    shared = states == {"optimizer"} or ("replicated" not in states and transfer.layer < layout.layers)
    return transfer.kind is Kind.REDUCE or shared
