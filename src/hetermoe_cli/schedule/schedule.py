"""Schedule: the order of every rank's compute tasks and the order of the transfers between them, as data."""

from dataclasses import dataclass

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


def inputs(action: Action, layers: int) -> list[Action]:
    """Tasks whose results `action` needs, whether or not they exist for a given rank (source: paper section 2).

    Order on one rank's compute stream is not repeated here: the schedule's order implies it.
    """
    layer, micro_batch = action.layer, action.micro_batch
    kinds, forward, backward = Kind, Pass.FORWARD, Pass.BACKWARD

    def task(kind: Kind, direction: Pass, at: int = layer) -> Action:
        return Action(kind, direction, at, micro_batch)

    match action.kind, action.direction:
        case kinds.ATTENTION, Pass.FORWARD:
            return [task(kinds.COMBINE, forward, layer - 1)] if layer else []
        case kinds.HEAD, _:
            return [task(kinds.COMBINE, forward, layers - 1)]
        case kinds.DISPATCH, Pass.FORWARD:
            return [task(kinds.ATTENTION, forward)]
        case kinds.EXPERT, Pass.FORWARD:
            return [task(kinds.DISPATCH, forward)]
        case kinds.COMBINE, Pass.FORWARD:
            return [task(kinds.EXPERT, forward)]
        case kinds.COMBINE, Pass.BACKWARD:
            last = layer == layers - 1
            return [task(kinds.HEAD, backward, 0) if last else task(kinds.ATTENTION, backward, layer + 1)]
        case kinds.EXPERT, Pass.BACKWARD:
            return [task(kinds.COMBINE, backward)]
        case kinds.DISPATCH, Pass.BACKWARD:
            return [task(kinds.EXPERT, backward)]
        case kinds.ATTENTION, Pass.BACKWARD:
            return [task(kinds.DISPATCH, backward)]
    return []
