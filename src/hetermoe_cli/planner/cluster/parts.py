"""A group's devices for the planner of groups: sub-cluster inputs, their costs, and rates that groups share."""

from functools import cached_property

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.compositions import Composition, ranks_of
from hetermoe_cli.planner.instance.device_rates import ClassRates, Times, device_rates, device_times
from hetermoe_cli.spec.cluster import NodeGroup, Origin, subcluster
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.schedule_choice import ScheduleChoice


def group_inputs(inputs: Inputs, ranks: list[int], sequences: int) -> Inputs:
    """What one group is planned from: its devices and its share of the batch."""
    part = inputs.with_train(global_batch_sequences=sequences)
    return part.model_copy(update={"cluster": subcluster(inputs.cluster, ranks), "origin": None})


def part_of(inputs: Inputs, ranks: list[int]) -> Inputs:
    """The inputs of the whole training on some of the devices, which know what cluster these are of."""
    origin = inputs.origin
    known = Origin(
        cluster=origin.cluster if origin else inputs.cluster, ranks=[origin.ranks[r] if origin else r for r in ranks]
    )
    part = group_inputs(inputs, ranks, inputs.train.global_batch_sequences)
    return part.model_copy(update={"origin": known})


class Kernels:
    """Rates of a device of each node group, whatever group it is in; looked up, or computed once."""

    def __init__(self, inputs: Inputs) -> None:
        apart = {"count": 2, "devices": 1, "nics": 1, "machine": None}
        nodes = [node.model_copy(update=apart) for node in inputs.cluster.nodes]
        cluster = inputs.cluster.model_copy(update={"nodes": nodes})
        self._inputs = inputs.model_copy(update={"cluster": cluster})
        self.cost = CostModel(self._inputs)
        self._among = {1: self.cost}  # costs by number of groups
        self._known: dict[tuple[object, ...], ClassRates] = {}
        self._known_times: dict[tuple[object, ...], Times] = {}

    def rates(
        self, kind: int, sequences: int, schedule: ScheduleChoice, total: int, attending: int, groups: int
    ) -> ClassRates:
        """Rates of a device of node group `kind` that attends to `sequences` of `total`, as one of `attending` in one
        of `groups`."""
        shared = attending if sequences and schedule.shares_states else 1
        key = (kind, sequences, total, shared, groups, schedule.window, schedule.recompute, schedule.dense_state)
        if key not in self._known:
            if groups not in self._among:
                self._among[groups] = CostModel(self._inputs, groups)
            times = self._times(kind, sequences, schedule, total)
            self._known[key] = device_rates(self._among[groups], 2 * kind, sequences, schedule, total, shared, times)
        return self._known[key]

    def _times(self, kind: int, sequences: int, schedule: ScheduleChoice, total: int) -> Times:
        key = kind, sequences, total, schedule.recompute
        if key not in self._known_times:
            self._known_times[key] = device_times(self.cost, 2 * kind, sequences, schedule, total)
        return self._known_times[key]


class Part:
    """One composition made ready: its ranks (of the first group that has it), costs and kinds of devices. `groups`: how
    many there are in all, as far as is known, so among how many states may be shared out."""

    def __init__(self, inputs: Inputs, composition: Composition, groups: int) -> None:
        self.inputs, self.composition, self.groups = inputs, composition, groups
        self.kinds = [kind for kind, count in enumerate(composition) if count]

    @cached_property
    def ranks(self) -> list[int]:
        """Ranks of the whole cluster."""
        return ranks_of(self.inputs.cluster, [(self.composition, 1)])[0][0]

    @cached_property
    def kind_of(self) -> list[int]:
        """Node group of each local rank."""
        owner = self.inputs.cluster.group_of_rank
        return [owner[rank] for rank in self.ranks]

    def cost(self, sequences: int) -> CostModel:
        """Costs for a share of the batch; the share changes no cost, so that all but the spec is computed once."""
        return CostModel(group_inputs(self.inputs, self.ranks, sequences))

    @cached_property
    def any_cost(self) -> CostModel:
        """Costs, with a stand-in for the share."""
        return self.cost(1)

    def node(self, kind: int) -> NodeGroup:
        """The node group."""
        return self.inputs.cluster.nodes[kind]

    @property
    def world_size(self) -> int:
        """Devices."""
        return sum(self.composition)
