"""The simulator's rules in the plainest form: one task a rank and action, lists of what each waits for."""

from collections.abc import Callable, Sequence

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.schedule import Schedule
from hetermoe_cli.trace import Span, display_name, lane_of

Task = tuple[int, Action]  # rank -1: of all ranks, or of a transfer's participants


def waits(schedule: Schedule, layers: int, ports: Callable[[Action], object]) -> dict[Task, list[Task]]:
    """All tasks, rank by rank and then transfers, and what each waits for."""
    result: dict[Task, list[Task]] = {}
    for rank, order in enumerate(schedule.compute):
        previous: Task | None = None
        for action in order:
            task = (-1 if action.kind is Kind.SYNCHRONISE else rank, action)
            found = result.setdefault(task, [])
            found += [previous] if previous else []
            found += [(-1, s) for s in sources(schedule, action, layers) if rank in schedule.receivers.get(s, ())]
            previous = task
    last: dict[object, Task] = {}
    for action in schedule.transfers:
        used = [("port", port) for port in ports(action)]  # type: ignore[attr-defined]
        for lane, ranks in zip(schedule.lanes_of(action), (schedule.senders, schedule.receivers), strict=True):
            used += [(lane, rank) for rank in ranks[action]]
        found = [last[key] for key in used if key in last]
        makers = [*schedule.sources(action, layers)]
        if action.kind is Kind.REDUCE:  # of ranks that hold experts of the layer
            makers.append(Action(Kind.EXPERT, action.direction, action.layer, action.micro_batch))
        found += [(rank, source) for source in makers for rank in schedule.senders[action]]
        result[-1, action] = [task for task in found if task in result]
        last |= dict.fromkeys(used, (-1, action))
    return result


def sources(schedule: Schedule, action: Action, layers: int) -> Sequence[Action]:
    if action.kind is Kind.SYNCHRONISE:
        return [t for t in schedule.transfers if t.kind is Kind.REDUCE]
    return schedule.needs(action, layers)


def participants(schedule: Schedule, action: Action) -> set[int]:
    if action.kind is Kind.SYNCHRONISE:
        return set(range(schedule.world_size))
    return {*schedule.senders[action], *schedule.receivers[action]}


def started(waiting: dict[Task, list[Task]], seconds: Callable[[Task], float]) -> dict[Task, tuple[float, float]]:
    """Start and end of every task that can start."""
    times: dict[Task, tuple[float, float]] = {}
    progress = True
    while progress:
        progress = False
        for task, before in waiting.items():
            if task not in times and all(other in times for other in before):
                start = max((times[other][1] for other in before), default=0.0)
                times[task], progress = (start, start + seconds(task)), True
    return times


def reference_spans(cost: LayoutCost, schedule: Schedule) -> list[Span] | None:
    """Sorted spans of an iteration; None where some task never starts."""

    def seconds(task: Task) -> float:
        rank, action = task
        if action.kind is Kind.SYNCHRONISE:
            return cost.synchronise_seconds
        return cost.transfer(action).seconds if rank < 0 else cost.seconds(rank, action)

    waiting = waits(schedule, cost.layout.layers, lambda action: cost.transfer(action).ports)
    times = started(waiting, seconds)
    if len(times) < len(waiting):
        return None
    spans = []
    for (rank, action), (start, end) in times.items():
        ranks = [rank] if rank >= 0 else participants(schedule, action)
        spans += [Span(place, lane_of(action), display_name(action), start, end) for place in ranks]
    return sorted(spans)


def never_start(schedule: Schedule, layers: int) -> list[Task]:
    """Tasks that never start where each rank's transfers run strictly one after another."""
    waiting = waits(schedule, layers, lambda action: participants(schedule, action))
    times = started(waiting, lambda task: 1.0)
    return [task for task in waiting if task not in times]
