"""Schedule: the order of every rank's compute tasks and the order of the transfers between them, as data."""

from dataclasses import dataclass
from functools import lru_cache

from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Action, Kind, Pass, parse_action


@dataclass(frozen=True)
class Schedule:
    """One iteration.

    `compute[r]` is rank r's compute order. `transfers` is one static order over all transfers: of two that share a
    NIC direction, the earlier one goes first; `senders` and `receivers` say who takes part.
    """

    compute: tuple[tuple[Action, ...], ...]
    transfers: tuple[Action, ...]
    senders: dict[Action, tuple[int, ...]]
    receivers: dict[Action, tuple[int, ...]]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.compute)

    def transfers_of(self, rank: int) -> list[Action]:
        """The transfers that `rank` takes part in, in order."""
        return [t for t in self.transfers if rank in self.senders[t] or rank in self.receivers[t]]

    def __str__(self) -> str:
        """Text form: a line per rank, then a line per transfer with its senders and receivers."""
        lines = [f"rank {rank}: {' '.join(map(str, order))}".rstrip() for rank, order in enumerate(self.compute)]
        for transfer in self.transfers:
            senders = ",".join(map(str, self.senders[transfer]))
            receivers = ",".join(map(str, self.receivers[transfer]))
            lines.append(f"transfer {transfer}: {senders} > {receivers}")
        return "\n".join(lines) + "\n"


def parse_schedule(text: str) -> Schedule:
    """Inverse of str(schedule); UserError names the line that does not parse."""
    compute: list[tuple[Action, ...]] = []
    transfers: list[Action] = []
    senders: dict[Action, tuple[int, ...]] = {}
    receivers: dict[Action, tuple[int, ...]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            head, body = line.split(":", 1)
            word, name = head.split()
            if word == "rank" and int(name) == len(compute):
                compute.append(tuple(map(parse_action, body.split())))
            elif word == "transfer":
                action = parse_action(name)
                left, right = body.split(">")
                transfers.append(action)
                senders[action] = tuple(int(rank) for rank in left.split(","))
                receivers[action] = tuple(int(rank) for rank in right.split(","))
            else:
                raise ValueError(line)
        except ValueError as error:
            raise UserError(f"schedule: line {number} does not parse: {line!r}") from error
    return Schedule(tuple(compute), tuple(transfers), senders, receivers)


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
}


@lru_cache(maxsize=65536)
def inputs(action: Action, layers: int) -> tuple[Action, ...]:
    """Tasks whose results `action` needs, whether or not a given rank has them (source: arXiv 2504.03871).

    Order on one rank's compute stream is not repeated here: the schedule's order implies it.
    """
    kind, direction, layer, micro_batch = action
    if kind is Kind.REDUCE:
        return completions(action, layers)[-1:]
    if kind is Kind.HEAD:
        return (Action(Kind.COMBINE, _FORWARD, layers - 1, micro_batch),)
    if kind is Kind.COMBINE and direction is _BACKWARD and layer == layers - 1:
        return (Action(Kind.HEAD, _BACKWARD, 0, micro_batch),)
    if (kind, direction) not in _SOURCES or (kind is Kind.ATTENTION and direction is _FORWARD and not layer):
        return ()
    of, way, distance = _SOURCES[kind, direction]
    return (Action(of, way, layer + distance, micro_batch),)


def completions(reduce: Action, layers: int) -> tuple[Action, ...]:
    """Tasks that complete the gradients of an R: of a rank that hosts only, that of its experts; else the last one."""
    _, _, layer, micro_batch = reduce
    if layer == layers:
        return (Action(Kind.HEAD, _BACKWARD, 0, micro_batch),)
    return tuple(Action(kind, _BACKWARD, layer, micro_batch) for kind in (Kind.EXPERT, Kind.ATTENTION))
