"""Event simulator: Schedule + costs -> Trace. With unit costs it is the deadlock check."""

from collections.abc import Callable
from dataclasses import dataclass

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.ports import TransferCost
from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.schedule.schedule import Schedule, inputs
from hetermoe_cli.trace import Span, Trace, display_name, lane_of


@dataclass
class _Graph:
    """Tasks as numbers: durations, edges and the number of open dependencies."""

    tasks: list[tuple[int, Action]]  # rank -1: a task of several ranks
    seconds: list[float]
    after: list[list[int]]
    waiting: list[int]

    def add(self, rank: int, action: Action, seconds: float) -> int:
        self.tasks.append((rank, action))
        self.seconds.append(seconds)
        self.after.append([])
        self.waiting.append(0)
        return len(self.tasks) - 1

    def edge(self, first: int, second: int) -> None:
        self.after[first].append(second)
        self.waiting[second] += 1

    def run(self) -> tuple[list[float], list[float]]:
        """Start and end of every task; a task starts when all that it waits for have ended."""
        starts, ends = [0.0] * len(self.tasks), [0.0] * len(self.tasks)
        ready = [task for task, count in enumerate(self.waiting) if not count]
        done = 0
        for task in ready:  # grows while it is read
            end = ends[task] = starts[task] + self.seconds[task]
            done += 1
            for following in self.after[task]:
                if end > starts[following]:
                    starts[following] = end
                self.waiting[following] -= 1
                if not self.waiting[following]:
                    ready.append(following)
        if done < len(self.tasks):
            stuck = [
                f"rank {rank} {action}" if rank >= 0 else f"transfer {action}"
                for (rank, action), count in zip(self.tasks, self.waiting, strict=True)
                if count
            ]
            raise UserError(f"schedule: deadlock: {len(stuck)} tasks never start, the first is {stuck[0]}")
        return starts, ends


def simulate(cost: LayoutCost, schedule: Schedule | None = None) -> Trace:
    """Replay one iteration of the layout (its training schedule unless another is given)."""
    return _replay(
        schedule or training_schedule(cost.layout),
        cost.layout.layers,
        cost.seconds,
        cost.transfer,
        cost.synchronise_seconds,
    )


def check_deadlock(schedule: Schedule, layers: int) -> None:
    """UserError if some task can never start, or if a transfer has no answer.

    Each rank's transfers run strictly one after another here, as the engine's ordered mode issues them: what passes
    passes for any costs and any sharing of ports.
    """
    for transfer in schedule.transfers:
        if transfer.answer not in schedule.senders:
            raise UserError(f"schedule: transfer {transfer} has no answer {transfer.answer}")
    _replay(
        schedule,
        layers,
        lambda rank, action: 1.0,
        lambda action: TransferCost(1.0, tuple(_participants(schedule, action))),
        1.0,
    )


def _replay(
    schedule: Schedule,
    layers: int,
    seconds: Callable[[int, Action], float],
    transfer: Callable[[Action], TransferCost],
    synchronise_seconds: float,
) -> Trace:
    graph = _Graph([], [], [], [])
    nodes = _add_compute(graph, schedule, seconds, synchronise_seconds)
    transfers = _add_transfers(graph, schedule, layers, nodes, transfer)
    for action, node_of in nodes.items():
        for source in inputs(action, layers):
            if source in transfers:
                for rank in schedule.receivers[source]:
                    if rank in node_of:
                        graph.edge(transfers[source], node_of[rank])
    starts, ends = graph.run()
    spans: list[Span] = []
    for (rank, action), start, end in zip(graph.tasks, starts, ends, strict=True):
        lane, name = lane_of(action), display_name(action)
        places = [rank] if rank >= 0 else _participants(schedule, action)
        spans += [Span(place, lane, name, start, end) for place in places]
    return Trace("simulated", spans)


def _participants(schedule: Schedule, action: Action) -> list[int]:
    if not action.is_transfer:
        return list(range(schedule.world_size))
    return sorted({*schedule.senders[action], *schedule.receivers[action]})


def _add_compute(
    graph: _Graph, schedule: Schedule, seconds: Callable[[int, Action], float], synchronise_seconds: float
) -> dict[Action, dict[int, int]]:
    """Compute tasks chained in each rank's order, by action and rank; S is one task of all ranks."""
    nodes: dict[Action, dict[int, int]] = {}
    shared: dict[Action, int] = {}
    for rank, order in enumerate(schedule.compute):
        previous: int | None = None
        for action in order:
            if action.kind is Kind.SYNCHRONISE:
                if action not in shared:
                    shared[action] = graph.add(-1, action, synchronise_seconds)
                node = shared[action]
            else:
                node = graph.add(rank, action, seconds(rank, action))
            nodes.setdefault(action, {})[rank] = node
            if previous is not None:
                graph.edge(previous, node)
            previous = node
    return nodes


def _add_transfers(
    graph: _Graph,
    schedule: Schedule,
    layers: int,
    nodes: dict[Action, dict[int, int]],
    transfer: Callable[[Action], TransferCost],
) -> dict[Action, int]:
    """Transfers after their senders' tasks, and after earlier ones on the same port or on a participant's lane."""
    transfers: dict[Action, int] = {}
    last: dict[object, int] = {}
    for action in schedule.transfers:
        cost = transfer(action)
        node = transfers[action] = graph.add(-1, action, cost.seconds)
        for source in inputs(action, layers):
            node_of = nodes.get(source, {})
            for rank in schedule.senders[action]:
                if rank in node_of:
                    graph.edge(node_of[rank], node)
        lane = action.towards_experts
        used = [*cost.ports, *((lane, rank) for rank in _participants(schedule, action))]
        for earlier in {last[key] for key in used if key in last}:
            graph.edge(earlier, node)
        last.update(dict.fromkeys(used, node))
    return transfers
