"""Task graph of one iteration on class level, read from the very schedule that simulator and engine run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from hetermoe_cli.planner.instance.choice import Choice, DeviceClass
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.schedule.schedule import Schedule, inputs


class Task(NamedTuple):
    """A compute task of one device of a class, or (class -1) a transfer."""

    device_class: int
    action: Action


@dataclass(frozen=True, slots=True)
class Hosts:
    """Condition: `device_class` hosts experts of `layer`."""

    layer: int
    device_class: int


@dataclass(frozen=True, slots=True)
class Shares:
    """Condition: transfers from the hosts of one layer and towards those of the other share a port; first <= second."""

    first: int
    second: int


@dataclass(frozen=True, slots=True)
class Ring:
    """Condition: transfers of `layer` use a port of the ring through the attending ranks."""

    layer: int


Condition = Hosts | Shares | Ring


class Edge(NamedTuple):
    """`after` starts when `before` and then the tasks `between` have ended, where `condition` holds."""

    before: int
    after: int
    condition: Condition | None
    between: tuple[Task, ...] = ()


@dataclass
class TaskGraph:
    """Tasks in an order in which every edge points forward, edges, every class's last task, the last all-reduce."""

    tasks: list[Task] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    last: list[int | None] = field(default_factory=list)
    reduced: int | None = None


def task_graph(choice: Choice, classes: Sequence[DeviceClass], layers: int) -> TaskGraph:
    """Every task that some placement needs. Where a class hosts nothing its expert task takes no time.

    Why conditions suffice: a transfer without rows takes no time and has no edge to what it would feed, and the
    other edges of such a task hold anyway (A of the next layer follows A of this one on every attending rank).
    """
    schedule = training_schedule(choice.full_layout(layers))
    graph = TaskGraph()
    index: dict[Task, int] = {}
    for number, device_class in enumerate(classes):
        order = [a for a in schedule.compute[device_class.ranks[0]] if a.kind not in (Kind.SYNCHRONISE, Kind.OPTIMIZER)]
        for action in order:
            index[Task(number, action)] = len(index)
        graph.edges += _chain([index[Task(number, action)] for action in order])
        graph.last.append(index[Task(number, order[-1])] if order else None)
    for action in schedule.transfers:
        index[Task(-1, action)] = len(index)
    rows = [action for action in schedule.transfers if not action.is_collective]
    graph.edges += _data_edges(index, len(classes), schedule, layers)
    graph.edges += _lane_edges(index, rows)
    graph.edges += _ring_edges(index, schedule.transfers)
    graph.reduced = next((index[Task(-1, a)] for a in schedule.transfers[::-1] if a.kind is Kind.REDUCE), None)
    graph.tasks = list(index)
    return _sorted(graph)


def coarse(graph: TaskGraph, window: int) -> TaskGraph:
    """The graph without the micro-batches in the middle of each window; what lies on a path through them is `between`.

    Its makespan is never above the graph's, and the same in every case that tests try: all micro-batches of a layer
    take as long, so that a longest path may change from one resource to another at the first or the last of them.
    """
    reduced = set() if graph.reduced is None else {graph.tasks[graph.reduced].action.micro_batch - 1}
    kept = [_outer(task.action, window) or task.action.micro_batch in reduced for task in graph.tasks]
    previous, following = _neighbours(graph)
    place = {node: number for number, node in enumerate(node for node, keep in enumerate(kept) if keep)}
    edges: dict[Edge, None] = {}
    for before, after, condition, _ in graph.edges:
        if not (kept[before] or kept[after]):
            continue
        first, last, between = before, after, []
        while not kept[first]:
            between.append(graph.tasks[first])
            first = previous[first]
        while not kept[last]:
            if condition is None:
                between.append(graph.tasks[last])
            last = following[last]
        edges[Edge(place[first], place[last], condition, tuple(sorted(between, key=str)))] = None
    return TaskGraph(
        [graph.tasks[node] for node in place],
        sorted(edges, key=lambda e: e.after),
        [None if node is None else place[node] for node in graph.last],
        None if graph.reduced is None else place[graph.reduced],
    )


def _outer(action: Action, window: int) -> bool:
    """Whether the action is of the first or the last micro-batch of a window, or a collective."""
    return action.is_collective or action.micro_batch % window in (0, window - 1)


def _neighbours(graph: TaskGraph) -> tuple[dict[int, int], dict[int, int]]:
    """The task before and after each one on its own stream or lane."""

    def resource(task: Task) -> tuple[int, bool, bool]:
        transfer = task.device_class < 0
        return task.device_class, transfer and task.action.towards_experts, task.action.is_collective

    pairs = [
        (e.before, e.after)
        for e in graph.edges
        if e.condition is None and resource(graph.tasks[e.before]) == resource(graph.tasks[e.after])
    ]
    return {after: before for before, after in pairs}, dict(pairs)


def _chain(nodes: list[int]) -> list[Edge]:
    return [Edge(first, second, None) for first, second in pairwise(nodes)]


def _data_edges(index: dict[Task, int], classes: int, schedule: Schedule, layers: int) -> list[Edge]:
    edges = []
    for task, node in index.items():
        if task.action.is_transfer:
            made = schedule.sources(task.action, layers)
            sources = made[-1:] if task.action.kind is Kind.REDUCE else made  # one group: attending ranks send it
            makers = [Task(number, source) for source in sources for number in range(classes)]
        else:
            makers = [Task(-1, source) for source in inputs(task.action, layers)]
            if task.action.kind is Kind.EXPERT:  # one group: rows follow from attention that has had these weights
                makers = [maker for maker in makers if not maker.action.is_collective]
        edges += [Edge(index[maker], node, _condition(maker, task)) for maker in makers if maker in index]
    return edges


def _condition(before: Task, after: Task) -> Hosts | None:
    compute = before if after.action.is_transfer else after
    return Hosts(compute.action.layer, compute.device_class) if compute.action.kind is Kind.EXPERT else None


def _lane_edges(index: dict[Task, int], transfers: Sequence[Action]) -> list[Edge]:
    """Dispatches and combines of a lane follow each other; where the lane changes, those that share a port do as well.

    Earlier transfers on the other lane, and those of the same micro-batch, come first by their data.
    """
    edges = []
    last: dict[bool, int] = {}
    previous: Action | None = None
    for action in transfers:
        node, lane = index[Task(-1, action)], action.towards_experts
        if lane in last:
            edges.append(Edge(last[lane], node, None))
        if previous and previous.towards_experts != lane and previous.micro_batch != action.micro_batch:
            layers = sorted((previous.layer, action.layer))
            edges.append(Edge(index[Task(-1, previous)], node, Shares(*layers)))
        last[lane], previous = node, action
    return edges


def _ring_edges(index: dict[Task, int], transfers: Sequence[Action]) -> list[Edge]:
    """Collectives follow each other, and the last transfers before them and the next ones after on shared ports.

    Earlier and later ones than those come before and after by the order of their lanes, or by that of collectives.
    """
    edges: list[Edge] = []
    collectives = [place for place, action in enumerate(transfers) if action.is_collective]
    edges += _chain([index[Task(-1, transfers[place])] for place in collectives])
    for place in collectives:
        node = index[Task(-1, transfers[place])]
        for side, before in ((transfers[place::-1], True), (transfers[place:], False)):
            for towards in (True, False):
                near = next((a for a in side if not a.is_collective and a.towards_experts is towards), None)
                if near:
                    pair = (index[Task(-1, near)], node) if before else (node, index[Task(-1, near)])
                    edges.append(Edge(*pair, Ring(near.layer)))
    return edges


def _sorted(graph: TaskGraph) -> TaskGraph:
    """Renumber so that edges point forward."""
    after: list[list[int]] = [[] for _ in graph.tasks]
    waiting = [0] * len(graph.tasks)
    for edge in graph.edges:
        after[edge.before].append(edge.after)
        waiting[edge.after] += 1
    order = [node for node, count in enumerate(waiting) if not count]
    for node in order:  # grows while it is read
        for following in after[node]:
            waiting[following] -= 1
            if not waiting[following]:
                order.append(following)
    place = {node: position for position, node in enumerate(order)}
    return TaskGraph(
        [graph.tasks[node] for node in order],
        sorted((Edge(place[e.before], place[e.after], e.condition) for e in graph.edges), key=lambda e: e.after),
        [None if node is None else place[node] for node in graph.last],
        None if graph.reduced is None else place[graph.reduced],
    )
