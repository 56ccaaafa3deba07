"""Replay several groups: each in the simulator on its own, then joined where all of them synchronise."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.ports import TransferCost
from hetermoe_cli.planner.cluster.parts import group_inputs
from hetermoe_cli.planner.cluster.synchronise import Copy, synchronise_seconds
from hetermoe_cli.schedule.action import Kind
from hetermoe_cli.schedule.zebra import OPTIMIZER
from hetermoe_cli.simulator import SimulatedTrace, simulate
from hetermoe_cli.spec.plan import Group, Inputs, Memory


class GroupCost(LayoutCost):
    """A layout whose synchronisation is not its own affair: it begins when all groups have computed, and lasts until
    all have synchronised."""

    def __init__(self, cost: CostModel, group: Group, synchronise: float) -> None:
        super().__init__(cost, group.layout)
        self._synchronise = synchronise

    def collective(self, kind: Kind, layer: int, *, last: bool = True) -> TransferCost:
        """Nothing: not during forward and backward."""
        return TransferCost(0.0, ())

    @cached_property
    def synchronise_seconds(self) -> float:
        """Seconds from the group's own last gradient."""
        return self._synchronise


@dataclass(frozen=True)
class ReplayedGroup:
    """One layout on its first replica; the others run the same. Seconds from the start of the iteration."""

    group: Group
    cost: CostModel
    trace: SimulatedTrace  # as if synchronising took no time
    computed: float  # when its last gradient is there
    optimizer: float
    memory: list[Memory]


@dataclass(frozen=True)
class Replayed:
    """All groups of a plan."""

    groups: list[ReplayedGroup]
    synchronise: float

    @property
    def computed(self) -> float:
        """When the last group has its last gradient."""
        return max(g.computed for g in self.groups)

    @property
    def seconds(self) -> float:
        """The iteration: the slowest group's compute, synchronisation, the slowest optimizer step."""
        return self.computed + self.synchronise + max(g.optimizer for g in self.groups)

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


def joined(done: list[ReplayedGroup], whole: CostModel) -> Replayed:
    """Replayed layouts side by side. A group that is alone synchronises during its backward: what that adds counts."""
    copies = [Copy(g.group.layout, ranks, g.cost) for g in done for ranks in g.group.replicas]
    if len(copies) == 1:
        alone = simulate(LayoutCost(done[0].cost, done[0].group.layout)).seconds
        return Replayed(done, alone - done[0].trace.seconds)
    return Replayed(done, synchronise_seconds(whole, copies))


def group_cost(inputs: Inputs, group: Group) -> CostModel:
    """Costs of a layout's first replica."""
    return CostModel(group_inputs(inputs, group.replicas[0], group.sequences))


def replay_group(inputs: Inputs, group: Group) -> ReplayedGroup:
    """Replay one layout on its first replica."""
    cost = group_cost(inputs, group)
    layout_cost = GroupCost(cost, group, 0.0)
    trace = simulate(layout_cost)
    world = range(len(group.sequences_per_rank))
    optimizer = max(layout_cost.seconds(rank, OPTIMIZER) for rank in world)
    memory = [layout_cost.memory(rank) for rank in world]
    return ReplayedGroup(group, cost, trace, trace.seconds - optimizer, optimizer, memory)


def _unused(whole: CostModel, rank: int) -> Memory:
    names = [name for name in Memory.model_fields if name != "capacity_bytes"]
    return Memory(**dict.fromkeys(names, 0), capacity_bytes=whole.of(rank).memory_bytes)
