"""Expert parallelism in equal groups: what one would do without planning groups, as a baseline for plans of several.

Every number of groups that splits all node groups evenly is tried, each group run by the one-group rival and replayed
with the synchronisation of all groups; from many small groups to few large ones, until the time is gone.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.baselines.even import ep, hetero_ep
from hetermoe_cli.planner.baselines.rival import Rival
from hetermoe_cli.planner.cluster.compositions import Composition, amounts, ranks_of
from hetermoe_cli.planner.cluster.parts import group_inputs
from hetermoe_cli.planner.cluster.replayed import Replayed, replay_groups
from hetermoe_cli.spec.plan import Baseline, Group

EVEN = {"ep": ep, "hetero_ep": hetero_ep}
Method = Callable[[CostModel, int], Rival]


@dataclass(frozen=True)
class EvenGroups:
    """A rival's best equal groups and their replay; None, and the reason, where there are none."""

    groups: list[Group]
    replayed: Replayed | None
    reason: str

    def baseline(self) -> Baseline:
        """What a plan stores."""
        if self.replayed is None:
            return Baseline(iteration_seconds=None, reason=self.reason)
        schedule = self.groups[0].schedule
        return Baseline(iteration_seconds=self.replayed.seconds, schedule=schedule, reason=self.reason)


def even_groups(cost: CostModel, limit: int, most_groups: int | None, seconds: float) -> dict[str, EvenGroups]:
    """Each rival's best; takes about `seconds` for each."""
    return {name: _best(cost, limit, most_groups, method, seconds) for name, method in EVEN.items()}


def _best(cost: CostModel, limit: int, most_groups: int | None, method: Method, seconds: float) -> EvenGroups:
    deadline = time.monotonic() + seconds
    best, why = EvenGroups([], None, ""), "no number of equal groups divides devices and batch"
    for composition, number in _splits(cost, most_groups):
        if time.monotonic() > deadline:
            why = f"larger groups not tried within {seconds:.1f} s; {why}"
            break
        replicas = ranks_of(cost.inputs.cluster, [(composition, number)])[0]
        share = cost.train.global_batch_sequences // number
        rival = method(CostModel(group_inputs(cost.inputs, replicas[0], share), number), limit)
        if rival.layout is None:
            why = f"{number} equal groups: {rival.reason}"
            continue
        groups = [Group.of(rival.layout, replicas)]
        replayed = replay_groups(cost.inputs, groups, cost)
        if best.replayed is None or replayed.seconds < best.replayed.seconds:
            best = EvenGroups(groups, replayed, f"{number} equal groups")
    return best if best.replayed else EvenGroups([], None, why)


def _splits(cost: CostModel, most_groups: int | None) -> Iterator[tuple[Composition, int]]:
    """Equal groups that take all devices and the whole batch, most groups first."""
    sizes = [node.count * node.devices for node in cost.inputs.cluster.nodes]
    common = gcd(*sizes, cost.train.global_batch_sequences)
    for number in range(min(common, most_groups or common), 0, -1):
        composition = tuple(size // number for size in sizes)
        if common % number == 0 and all(
            count in amounts(node) for count, node in zip(composition, cost.inputs.cluster.nodes, strict=True)
        ):
            yield composition, number
