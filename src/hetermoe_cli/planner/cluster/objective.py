"""Objectives: the fastest plan, the most tokens for a dollar, and a limit on dollars an hour."""

from collections.abc import Sequence
from dataclasses import dataclass

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.work import work_dollars
from hetermoe_cli.spec.cluster import ClusterSpec
from hetermoe_cli.spec.plan import Economy, Objective

HOUR = 3600.0  # seconds


@dataclass(frozen=True)
class Wanted:
    """What the plan is to be best at. `most_groups` None: as many as are good. `stages`: whether it may have pipeline
    stages."""

    objective: Objective = "time"
    most_cost: float | None = None
    most_groups: int | None = None
    stages: bool = True

    @property
    def needs_prices(self) -> bool:
        """Whether every device must have a price."""
        return self.objective == "cost" or self.most_cost is not None


def prices(cluster: ClusterSpec) -> list[float]:
    """Dollars an hour of a device of each node group; UserError names the first group without a price."""
    result = []
    for node in cluster.nodes:
        if node.price_per_hour is None:
            raise UserError(
                f"cluster {cluster.name}: field nodes.{node.name}.price_per_hour: missing, and --objective cost and "
                "--max-cost need it: state the dollars that one of its devices costs an hour"
            )
        result.append(node.price_per_hour)
    return result


def known_prices(cluster: ClusterSpec) -> list[float] | None:
    """The same, or None where one is missing."""
    return None if any(node.price_per_hour is None for node in cluster.nodes) else prices(cluster)


def economy(cost: CostModel, ranks: Sequence[int], seconds: float, limit: int) -> Economy | None:
    """What the devices at `ranks` cost in iterations of `seconds`; None where a price is missing."""
    cluster = cost.inputs.cluster
    known = known_prices(cluster)
    if known is None:
        return None
    kinds = cluster.group_of_rank
    hourly = sum(known[kinds[rank]] for rank in ranks)
    tokens = cost.train.global_batch_sequences * cost.train.sequence_length
    return Economy(
        dollars_per_hour=hourly,
        tokens_per_dollar=tokens / (hourly / HOUR * seconds),
        most_tokens_per_dollar=tokens / least_dollars(cost, limit),
    )


def least_dollars(cost: CostModel, limit: int) -> float:
    """Dollars of an iteration that no plan can undercut."""
    cluster, known = cost.inputs.cluster, prices(cost.inputs.cluster)
    cheapest: dict[str, float] = {}
    for node, price in zip(cluster.nodes, known, strict=True):
        cheapest[node.device] = min(price / HOUR, cheapest.get(node.device, price / HOUR))
    return work_dollars(cost, limit, cheapest)
