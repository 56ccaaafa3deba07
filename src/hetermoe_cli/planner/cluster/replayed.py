"""Replay several groups: each in the simulator on its own, its gradients summed over all of them during its backward,
new weights of what they share out gathered during its forward.

Either lasts what it takes over the ranks of all groups, and starts when the group's own ranks have come to it: as if
all groups came at the same moment. Of equal groups that is so; of others the slowest one's replay is right where
it is last everywhere, and an iteration ends no sooner than it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.load import Load
from hetermoe_cli.cost.measured import MeasuredCost, MeasuredState
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.ports import TransferCost
from hetermoe_cli.cost.sharers import Sharers
from hetermoe_cli.planner.cluster.parts import group_inputs
from hetermoe_cli.planner.cluster.synchronise import Copy, collective_ports, gather_seconds, reduce_seconds
from hetermoe_cli.schedule.action import Kind
from hetermoe_cli.schedule.zebra import OPTIMIZER
from hetermoe_cli.simulator import SimulatedTrace, simulate
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Group, Memory

OverGroups = Mapping[Kind, Sequence[TransferCost]]  # what all groups sum (R) and gather (G) of a layer; last the head's


class GroupCost(LayoutCost):
    """A layout among other groups, which share nothing if there is no `over_groups`. `synchronise`: from the group's
    own last gradient until all groups may step; `sharers` as of LayoutMemory."""

    def __init__(
        self,
        cost: CostModel,
        layout: Layout,
        over_groups: OverGroups | None = None,
        synchronise: float = 0.0,
        load: Load | None = None,
        sharers: Sharers | None = None,
    ) -> None:
        super().__init__(cost, layout, load)
        self.sharers, self.synchronise_seconds = sharers, synchronise
        self.copies = 2 if over_groups else 1
        self._over_groups = over_groups

    def collective(self, kind: Kind, layer: int, *, whole: bool = True) -> TransferCost:
        """A layer's gradients or new weights over all groups. A fully sharded dense part is gathered within the group,
        and so are its gradients scattered in the windows before the last."""
        shared = self._over_groups[kind][layer] if self._over_groups else TransferCost(0.0, ())
        if whole and not (kind is Kind.GATHER and self.layout.gathers):
            return shared
        within = super().collective(kind, layer, whole=False)
        if not whole:
            return within
        return TransferCost(within.seconds + shared.seconds, tuple(sorted({*within.ports, *shared.ports})))


@dataclass(frozen=True)
class ReplayedGroup:
    """One layout on its first replica; the others run the same. Seconds from the start of the iteration."""

    group: Group
    cost: CostModel
    trace: SimulatedTrace  # as if synchronising took no time
    computed: float  # when its last gradient is there
    optimizer: float
    memory: list[Memory]
    over_groups: OverGroups | None = None
    reduced: float = 0.0  # when its last gradient is summed
    sharers: Sharers | None = None

    @property
    def fits(self) -> bool:
        """Whether memory holds it."""
        headroom = self.cost.train.memory_headroom
        return all(memory.total_bytes <= headroom * memory.capacity_bytes for memory in self.memory)


@dataclass(frozen=True)
class Replayed:
    """All groups of a plan."""

    groups: list[ReplayedGroup]

    @property
    def computed(self) -> float:
        """When the last group has its last gradient, if synchronising took no time."""
        return max(g.computed for g in self.groups)

    @property
    def reduced(self) -> float:
        """When all gradients are summed."""
        return max(g.reduced for g in self.groups)

    @property
    def synchronise(self) -> float:
        """Seconds that synchronising adds to the iteration."""
        return self.reduced - self.computed

    @property
    def seconds(self) -> float:
        """The iteration: the slowest group's compute, what synchronising adds, the slowest optimizer step."""
        return self.reduced + self.optimizer

    @property
    def copies(self) -> list[int]:
        """The number of the group of every copy of the model."""
        return [number for number, g in enumerate(self.groups) for _ in g.group.replicas]

    def cost_of(self, number: int, load: Load | None = None, *, waits: bool = True) -> LayoutCost:
        """Costs of a layout among the others; if it `waits`, its S lasts until the last of them has its gradients."""
        g = self.groups[number]
        wait = self.reduced - g.reduced if waits else 0.0
        return self._among(g, g.group.layout, wait, load)

    def with_placement(self, number: int, layout: Layout) -> LayoutCost:
        """Costs of a group, without its waiting, with experts in other places; what groups do together takes as long as
        now."""
        return self._among(self.groups[number], layout)

    def _among(self, g: "ReplayedGroup", layout: Layout, wait: float = 0.0, load: Load | None = None) -> LayoutCost:
        if not g.over_groups:
            return LayoutCost(g.cost, layout, load)
        return GroupCost(g.cost, layout, g.over_groups, wait, load, g.sharers)

    @property
    def optimizer(self) -> float:
        """The slowest optimizer step."""
        return max(g.optimizer for g in self.groups)

    def ready(self, number: int, load: Load | None = None) -> float:
        """When a group could step if no other were slower, under a load."""
        return simulate(self.cost_of(number, load, waits=False)).seconds - self.groups[number].optimizer

    def seconds_under(self, loads: Sequence[Load | None]) -> float:
        """The iteration with a load for every copy."""
        ready = [self.ready(number, load) for number, load in zip(self.copies, loads, strict=True)]
        return max(ready) + self.optimizer

    def busy_share(self, world_size: int) -> list[float]:
        """Share of the iteration in which each rank of the cluster computes; 0 in no group."""
        result = [0.0] * world_size
        for g in self.groups:
            shares = g.trace.busy_share(len(g.group.sequences_per_rank))
            for ranks in g.group.replicas:
                for rank, share in zip(ranks, shares, strict=True):
                    result[rank] = share * g.trace.seconds / self.seconds
        return result

    def memory(self, whole: CostModel) -> list[Memory]:
        """Bytes of every rank of the cluster; nothing in no group."""
        result = [_unused(whole, rank) for rank in range(len(whole.devices))]
        for g in self.groups:
            for ranks in g.group.replicas:
                for rank, memory in zip(ranks, g.memory, strict=True):
                    result[rank] = memory
        return result


def replay_groups(inputs: Inputs, groups: Sequence[Group], whole: CostModel | None = None) -> Replayed:
    """Replay every layout once and add what all groups together take to synchronise."""
    return joined([replay_group(inputs, group) for group in groups], whole or CostModel(inputs))


def iteration_seconds(inputs: Inputs, groups: Sequence[Group], whole: CostModel | None = None) -> float:
    """The seconds that replay_groups finds. A single copy of the model, which sums with nobody, is simulated once."""
    if len(groups) == len(groups[0].replicas) == 1:
        return simulate(LayoutCost(group_cost(inputs, groups[0]), groups[0].layout)).seconds
    return replay_groups(inputs, groups, whole).seconds


def joined(done: list[ReplayedGroup], whole: CostModel) -> Replayed:
    """Replayed layouts side by side."""
    copies = [Copy(g.group.layout, ranks, g.cost) for g in done for ranks in g.group.replicas]
    if len(copies) == 1:
        alone = simulate(LayoutCost(done[0].cost, done[0].group.layout))
        return Replayed([replace(done[0], reduced=alone.seconds - done[0].optimizer)])
    layers = range(whole.model.layers + 1)
    seconds = {
        kind: [of(whole, copies, layer) for layer in layers]
        for kind, of in ((Kind.REDUCE, reduce_seconds), (Kind.GATHER, gather_seconds))
    }
    sharers, groups = Sharers.of((g.group.layout, len(g.group.replicas)) for g in done), []
    for g in done:
        ports = collective_ports(whole, copies, Copy(g.group.layout, g.group.replicas[0], g.cost))
        shared = {kind: [*map(TransferCost, found, ports)] for kind, found in seconds.items()}
        layout_cost = GroupCost(g.cost, g.group.layout, shared, sharers=sharers)
        optimizer, memory = _steps(layout_cost)
        reduced = simulate(layout_cost).seconds - optimizer
        g = replace(g, over_groups=shared, reduced=reduced)
        groups.append(replace(g, optimizer=optimizer, memory=memory, sharers=sharers))
    return Replayed(groups)


def group_cost(inputs: Inputs, group: Group, copies: int = 1) -> CostModel:
    """Costs of a layout's first replica, where states are shared out over `copies` of the model."""
    return CostModel(group_inputs(inputs, group.replicas[0], group.sequences), copies)


def replay_measured(inputs: Inputs, groups: Sequence[Group], state: MeasuredState) -> Replayed:
    """Replay groups under what a run has measured. Replicas whose devices differ in speed count as groups of their own,
    in the same order."""
    done = []
    for group in groups:
        for _, replicas in groupby(group.replicas, key=lambda ranks: state.of(ranks).slowdown):
            part = Group.of(group.layout, list(replicas))
            ranks = part.replicas[0]
            cost = MeasuredCost(group_inputs(inputs, ranks, group.sequences), *state.of(ranks))
            done.append(replay_group(inputs, part, cost))
    return joined(done, CostModel(inputs))


def replay_moved(inputs: Inputs, replayed: Replayed, layouts: Sequence[Layout]) -> Replayed:
    """The same groups at the same costs, each with a layout that differs in where its experts are."""
    pairs = zip(replayed.groups, layouts, strict=True)
    done = [replay_group(inputs, Group.of(layout, g.group.replicas), g.cost) for g, layout in pairs]
    return joined(done, CostModel(inputs))


def replay_group(inputs: Inputs, group: Group, cost: CostModel | None = None) -> ReplayedGroup:
    """Replay one layout on its first replica, at costs of these devices (group_cost)."""
    cost = cost or group_cost(inputs, group)
    layout_cost = GroupCost(cost, group.layout)
    trace = simulate(layout_cost)
    optimizer, memory = _steps(layout_cost)
    return ReplayedGroup(group, cost, trace, trace.seconds - optimizer, optimizer, memory)


def _steps(layout_cost: LayoutCost) -> tuple[float, list[Memory]]:
    """Seconds of the slowest optimizer step; every rank's bytes."""
    world = range(layout_cost.layout.world_size)
    return max(layout_cost.seconds(rank, OPTIMIZER) for rank in world), [layout_cost.memory(rank) for rank in world]


def _unused(whole: CostModel, rank: int) -> Memory:
    names = [name for name in Memory.model_fields if name != "capacity_bytes"]
    return Memory(**dict.fromkeys(names, 0), capacity_bytes=whole.of(rank).memory_bytes)
