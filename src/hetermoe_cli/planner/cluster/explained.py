"""What binds a plan that was found by groups, and why other orders of it lost."""

from collections import defaultdict

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.replayed import GroupCost, Replayed, ReplayedGroup
from hetermoe_cli.planner.reasons.binding import binding, tight_memory, with_runner_ups
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.explanation import Explanation, TightMemory
from hetermoe_cli.spec.plan import Plan


def binding_of_groups(replayed: Replayed) -> Explanation:
    """All groups wait for the slowest one before they step, so its path is the iteration's.

    Ranks of tight memory are the cluster's.
    """
    slowest = max(replayed.groups, key=lambda g: g.reduced)
    found = binding(replayed.cost_of(replayed.groups.index(slowest)))
    path: dict[str, float] = defaultdict(float)
    for name, share in found.critical_path.items():
        path[_nic_names(slowest).get(name, name)] += share
    tight = [memory for g in replayed.groups for memory in _tight(g)]
    ordered = dict(sorted(path.items(), key=lambda item: -item[1]))
    return Explanation(critical_path=ordered, binding=next(iter(ordered)), tight_memory=tight)


def with_other_orders(plan: Plan, time_limit: float) -> Plan:
    """A plan of one group on all devices with what its placement would take in other orders; any other as it is."""
    group = plan.groups[0]
    if plan.explanation is None or group.replicas != [list(range(plan.inputs.cluster.world_size))]:
        return plan
    cost = LayoutCost(CostModel(plan.inputs), group.layout)
    explanation = with_runner_ups(plan.explanation, cost, simulate(cost).seconds, (), time_limit)
    return plan.model_copy(update={"explanation": explanation})


def _nic_names(group: ReplayedGroup) -> dict[str, str]:
    """A part of a cluster numbers the names of its node groups (cluster.subcluster)."""
    names = [node.name for node in group.cost.inputs.cluster.nodes]
    return {f"NIC of {name}": f"NIC of {name.rpartition('.')[0]}" for name in names}


def _tight(group: ReplayedGroup) -> list[TightMemory]:
    found = tight_memory(GroupCost(group.cost, group.group.layout, sharers=group.sharers))
    return [
        memory.model_copy(update={"ranks": sorted(ranks[r] for ranks in group.group.replicas for r in memory.ranks)})
        for memory in found
    ]
