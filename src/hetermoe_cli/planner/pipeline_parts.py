"""Pipelines where dollars count: on which devices, as those that are left out cost nothing.

Parts of the cluster, whole nodes where they are many, are looked at from where the objective is likely to be best: for
the most tokens a dollar those of one kind first, from few devices on, as every stage more waits longer for its turn;
for the fastest within a limit from what costs most.
"""

import time
from dataclasses import dataclass

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.baselines.pipeline import FEW_DEVICES, overlapped_pipelines
from hetermoe_cli.planner.cluster.compositions import Composition, compositions
from hetermoe_cli.planner.cluster.objective import HOUR, Wanted, dollars_per_hour, merit
from hetermoe_cli.planner.cluster.parts import Part
from hetermoe_cli.planner.pipelines import Setups
from hetermoe_cli.spec.cluster import ClusterSpec
from hetermoe_cli.spec.plan import Group

REPLAYED = 3  # parts


@dataclass(frozen=True)
class PartSetups:
    """Setups on some devices, with costs of these alone; `ranks`: theirs in the whole cluster."""

    cost: CostModel
    ranks: list[int]
    setups: Setups

    def whole(self, groups: list[Group]) -> list[Group]:
        """The same groups, with ranks of the whole cluster."""
        return [
            Group.of(group.layout, [[self.ranks[rank] for rank in replica] for replica in group.replicas])
            for group in groups
        ]


def promising_parts(cost: CostModel, wanted: Wanted, below: float, near: float, seconds: float) -> list[PartSetups]:
    """A few parts with setups that are estimated to be less than `below` by the objective, the best first; one that is
    `near` times as much as the best so far may still be better. At least one part is looked at, others while there is
    time (`seconds`)."""
    end, cluster, batch = time.monotonic() + seconds, cost.inputs.cluster, cost.train.global_batch_sequences
    found: list[tuple[float, PartSetups]] = []
    for dollars, part in _in_order(cost, wanted):
        own = part.cost(batch)
        most_seconds = below / dollars * HOUR if wanted.objective == "cost" else below
        if setups := overlapped_pipelines(own.balanced, near * most_seconds, wanted.most_groups):
            estimate = merit(cluster, wanted, part.ranks, setups[0][0])
            below = min(below, estimate)
            found.append((estimate, PartSetups(own, part.ranks, setups)))
        if time.monotonic() > end:
            break
    return [setups for _, setups in sorted(found, key=lambda pair: pair[0])[:REPLAYED]]


def _in_order(cost: CostModel, wanted: Wanted) -> list[tuple[float, Part]]:
    """Parts that may be used, with what an hour costs."""
    cluster = cost.inputs.cluster
    wide = [c for c in compositions(cluster) if sum(c) > 1 and _whole(cluster, c)]
    parts = [Part(cost.inputs, c, 1) for c in wide if _holds(cost, c)]
    priced = [(dollars_per_hour(cluster, part.ranks), part) for part in parts]
    allowed = [pair for pair in priced if merit(cluster, wanted, pair[1].ranks, 0.0) == 0]
    if wanted.objective == "time":
        return sorted(allowed, key=lambda pair: -pair[0])
    return sorted(allowed, key=lambda pair: (len(pair[1].kinds), pair[0]))


def _whole(cluster: ClusterSpec, composition: Composition) -> bool:
    """Whether these are whole nodes, or few devices: nothing else is looked at (overlapped_pipelines)."""
    pairs = zip(composition, cluster.nodes, strict=True)
    return sum(composition) <= FEW_DEVICES or all(count % node.devices == 0 for count, node in pairs)


def _holds(cost: CostModel, composition: Composition) -> bool:
    """Whether memory holds the states of all parameters once."""
    pairs = zip(composition, cost.inputs.cluster.nodes, strict=True)
    room = sum(count * cost.types[node.device].memory_bytes for count, node in pairs)
    return room * cost.train.memory_headroom >= sum(STATE_BYTES[cost.train.precision]) * cost.model.parameters
