"""Dataflow: a schedule as numbered tasks, each with what it waits for, in an order in which that comes first.

Ranks that run an action share one task, so that a thousand ranks cost little more than one: a task's times are vectors
over its ranks. Where that is impossible, because ranks run the same actions in different orders, each has its own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.schedule import Schedule

Ranks = NDArray[np.intp]
Places = Ranks | None  # positions among a task's ranks; None: all of them
Group = list[int]  # ranks with one order


@dataclass
class Compute:
    """A compute task on `ranks`. `arrivals`: transfers, and which of the ranks wait for them."""

    action: Action
    ranks: Ranks
    arrivals: list[tuple[int, Places]] = field(default_factory=list)


@dataclass
class Transfer:
    """A transfer. `makers`: compute tasks, and on which of their ranks it waits; `before`: transfers it follows."""

    action: Action
    before: set[int]
    makers: list[tuple[int, Places]] = field(default_factory=list)


@dataclass
class Dataflow:
    """Tasks by number: `compute` first, then `transfers`; `order` holds all of them."""

    world: int
    compute: list[Compute]
    transfers: list[Transfer]
    order: list[int]


def dataflow(schedule: Schedule, layers: int, ports: Sequence[tuple[int, ...]]) -> Dataflow:
    """UserError if some task can never start, or if the schedule lists one twice. `ports`: of each transfer.

    Transfers follow earlier ones on the same port or on a participant's lane (one each way).
    """
    before = _predecessors(schedule, ports)
    by_order: dict[int, Group] = {}
    for rank, order in enumerate(schedule.compute):
        by_order.setdefault(id(order), []).append(rank)
    graph = _Graph(schedule, layers, list(by_order.values()), together=True, before=before)
    if graph.stuck():
        graph = _Graph(schedule, layers, [[rank] for rank in range(schedule.world_size)], together=False, before=before)
    stuck = graph.stuck()
    if stuck:
        raise UserError(f"schedule: deadlock: {len(stuck)} tasks never start, the first is {graph.first(stuck)}")
    return Dataflow(schedule.world_size, graph.compute, graph.transfers, graph.order)


def _predecessors(schedule: Schedule, ports: Sequence[tuple[int, ...]]) -> list[set[int]]:
    """For each transfer the last ones before it on its ports and its participants' lanes."""
    if len(set(schedule.transfers)) < len(schedule.transfers):
        twice = next(t for index, t in enumerate(schedule.transfers) if t in schedule.transfers[:index])
        raise UserError(f"schedule: transfer {twice} is listed twice")
    kinds: dict[object, int] = {}  # transfers that use the same ports and lanes
    kind_of = []
    for action, used in zip(schedule.transfers, ports, strict=True):
        key = (schedule.lanes_of(action), used, schedule.senders[action], schedule.receivers[action])
        kind_of.append(kinds.setdefault(key, len(kinds)))
    conflicts = _conflicts(schedule.world_size, kinds)
    last = [-1] * len(kinds)
    result = []
    for transfer, kind in enumerate(kind_of):
        result.append({last[other] for other in conflicts[kind]} - {-1})
        last[kind] = transfer
    return result


def _conflicts(world: int, kinds: Iterable[Any]) -> list[list[int]]:
    """For each kind of transfer those that share a port or a lane with it."""
    keys = list(kinds)
    lanes = 1 + max((max(ports, default=-1) for _, ports, _, _ in keys), default=-1)
    lowest = min((min(numbers) for numbers, *_ in keys), default=0)
    count = 1 + max((max(numbers) for numbers, *_ in keys), default=0) - lowest
    uses = np.zeros((len(keys), lanes + count * world), dtype=np.float32)
    for row, (numbers, ports, senders, receivers) in zip(uses, keys, strict=True):
        row[list(ports)] = 1
        for number, ranks in zip(numbers, (senders, receivers), strict=True):
            row[lanes + world * (number - lowest) :][list(ranks)] = 1
    return [np.flatnonzero(row).tolist() for row in uses @ uses.T]


class _Graph:
    """Tasks of `groups` of ranks with one order; the same action of several groups is one task if `together`.

    Synchronisation is one task of all ranks in any case.
    """

    def __init__(
        self, schedule: Schedule, layers: int, groups: Sequence[Group], *, together: bool, before: Sequence[set[int]]
    ) -> None:
        self._schedule, self._layers, self._groups = schedule, layers, groups
        self._tables: list[dict[Action, int]] = [{}] if together else [{} for _ in groups]
        self._after: list[list[int]] = []
        self._waiting: list[int] = []
        self._teams = _Teams(schedule.world_size)
        self._team_of: list[int] = []
        self.compute: list[Compute] = []
        self._add_compute()
        self.transfers = [Transfer(action, earlier) for action, earlier in zip(schedule.transfers, before, strict=True)]
        self._add_transfers()
        self.order = self._sorted()

    def _add_compute(self) -> None:
        actions, groups_of = self._add_orders()
        known: dict[tuple[int, ...], int] = {}
        for action, groups in zip(actions, groups_of, strict=True):
            key = tuple(groups)
            if key not in known:
                known[key] = self._teams.add([rank for group in groups for rank in self._groups[group]])
            self._team_of.append(known[key])
            self.compute.append(Compute(action, self._teams.ranks[known[key]]))

    def _add_orders(self) -> tuple[list[Action], list[list[int]]]:
        """Number the actions and chain them; what each is and which groups run it."""
        actions: list[Action] = []
        groups_of: list[list[int]] = []
        shared: dict[Action, int] = {}
        for group, ranks in enumerate(self._groups):
            own, previous = self._tables[group % len(self._tables)], -1
            for action in self._schedule.compute[ranks[0]]:
                table = shared if action.kind is Kind.SYNCHRONISE else own
                task = table.get(action)
                if task is None:
                    task = table[action] = self._new()
                    actions.append(action)
                    groups_of.append([])
                elif groups_of[task][-1] == group:
                    raise UserError(f"schedule: rank {ranks[0]} runs {action} twice")
                groups_of[task].append(group)
                if previous >= 0:
                    self._edge(previous, task)
                previous = task
        return actions, groups_of

    def _add_transfers(self) -> None:
        schedule, first = self._schedule, len(self.compute)
        numbers = {action: self._new() for action in schedule.transfers}
        for transfer in self.transfers:
            number = numbers[transfer.action]
            for source in schedule.sources(transfer.action, self._layers):
                makers = [table[source] for table in self._tables if source in table]
                transfer.makers += self._chosen(makers, schedule.senders[transfer.action])
            for maker, _ in transfer.makers:
                self._edge(maker, number)
            for earlier in transfer.before:
                self._edge(first + earlier, number)
        for task, compute in enumerate(self.compute):
            for source in self._sources(compute.action):
                if source in numbers:
                    for _, places in self._chosen([task], schedule.receivers[source]):
                        compute.arrivals.append((numbers[source] - first, places))
                        self._edge(numbers[source], task)

    def _sources(self, action: Action) -> Sequence[Action]:
        """What a compute task needs; the end of synchronisation needs all gradients."""
        if action.kind is Kind.SYNCHRONISE:
            return [t for t in self._schedule.transfers if t.kind is Kind.REDUCE]
        return self._schedule.needs(action, self._layers)

    def _chosen(self, tasks: Sequence[int], ranks: tuple[int, ...]) -> list[tuple[int, Places]]:
        """Those of `tasks` that run on some of `ranks`, and where these stand among the task's own."""
        found = [(task, self._teams.places(self._team_of[task], ranks)) for task in tasks]
        return [(task, places) for task, places in found if places is None or len(places)]

    def _new(self) -> int:
        self._after.append([])
        self._waiting.append(0)
        return len(self._after) - 1

    def _edge(self, first: int, second: int) -> None:
        self._after[first].append(second)
        self._waiting[second] += 1

    def _sorted(self) -> list[int]:
        """All tasks that can start, each after what it waits for."""
        waiting = self._waiting
        order = [task for task, count in enumerate(waiting) if not count]
        for task in order:  # grows while it is read
            for following in self._after[task]:
                waiting[following] -= 1
                if not waiting[following]:
                    order.append(following)
        return order

    def stuck(self) -> list[int]:
        """Tasks that never start, in the order of the ranks, then of the transfers."""
        return [task for task, count in enumerate(self._waiting) if count]

    def first(self, stuck: Sequence[int]) -> str:
        """`rank 0 1AF0` or `transfer 0DF0`: not synchronisation, and what follows it, if another rank is to blame."""
        late = (Kind.SYNCHRONISE, Kind.OPTIMIZER)
        for task in [*stuck, stuck[0]]:
            if task >= len(self.compute):
                return f"transfer {self.transfers[task - len(self.compute)].action}"
            if self.compute[task].action.kind not in late:
                break
        return f"rank {self.compute[task].ranks[0]} {self.compute[task].action}"


class _Teams:
    """Which ranks of a team (those that share a task) a transfer's senders or receivers are."""

    def __init__(self, world: int) -> None:
        self._world = world
        self.ranks: list[Ranks] = []  # of each team
        self._flags: dict[tuple[int, ...], NDArray[np.bool_]] = {}
        self._places: dict[tuple[int, tuple[int, ...]], Places] = {}

    def add(self, ranks: Sequence[int]) -> int:
        """A new team's number."""
        self.ranks.append(np.array(ranks, dtype=np.intp))
        return len(self.ranks) - 1

    def places(self, team: int, ranks: tuple[int, ...]) -> Places:
        """Positions in `team` of those that are among `ranks`; None if all are."""
        key = team, ranks
        if key not in self._places:
            if ranks not in self._flags:
                self._flags[ranks] = np.zeros(self._world, dtype=np.bool_)
                self._flags[ranks][list(ranks)] = True
            found = self._flags[ranks][self.ranks[team]]
            self._places[key] = None if found.all() else np.flatnonzero(found)
        return self._places[key]
