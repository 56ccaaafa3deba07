"""Objectives: the fastest plan, the most tokens for a dollar, and a limit on dollars an hour."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.bounds.work import work_dollars
from hetermoe_cli.spec.cluster import ClusterSpec
from hetermoe_cli.spec.plan import Economy, Objective

HOUR = 3600.0  # seconds
ROUNDING = 1 + 1e-9  # of sums of prices
CHEAPEST_WORK = (
    "the gap is in tokens a dollar: to perfectly divisible work, each kind on the type that is cheapest at it"
)


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


def why_not_used(wanted: Wanted) -> str:
    """Of devices that are in no group."""
    return "they would not pay for themselves" if wanted.needs_prices else "they would slow the others down"


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


def merit(cluster: ClusterSpec, wanted: Wanted, ranks: Iterable[int], seconds: float) -> float:
    """What is to be least: seconds of an iteration on the devices at `ranks`, or its dollars; infinite where an hour
    costs more than it may."""
    if not wanted.needs_prices:
        return seconds
    hourly = dollars_per_hour(cluster, ranks)
    if wanted.most_cost is not None and hourly > wanted.most_cost * ROUNDING:
        return inf
    return hourly / HOUR * seconds if wanted.objective == "cost" else seconds


def dollars_per_hour(cluster: ClusterSpec, ranks: Iterable[int]) -> float:
    """Of the devices at `ranks`. UserError where a price is missing."""
    known, kinds = prices(cluster), cluster.group_of_rank
    return sum(known[kinds[rank]] for rank in ranks)


def economy(
    cost: CostModel, ranks: Sequence[int], seconds: float, limit: int, *, stages: bool = False
) -> Economy | None:
    """What the devices at `ranks` cost in iterations of `seconds`; None where a price is missing. `stages`: whether the
    plan has pipeline stages, or the head apart."""
    if known_prices(cost.inputs.cluster) is None:
        return None
    hourly = dollars_per_hour(cost.inputs.cluster, ranks)
    tokens = cost.train.tokens
    return Economy(
        dollars_per_hour=hourly,
        tokens_per_dollar=tokens / (hourly / HOUR * seconds),
        most_tokens_per_dollar=tokens / least_dollars(cost, limit, stages=stages),
    )


def least_dollars(cost: CostModel, limit: int, *, stages: bool = False) -> float:
    """Dollars of an iteration that no plan can undercut (`stages`: none with pipeline stages either)."""
    cluster, known = cost.inputs.cluster, prices(cost.inputs.cluster)
    cheapest: dict[str, float] = {}
    for node, price in zip(cluster.nodes, known, strict=True):
        cheapest[node.device] = min(price / HOUR, cheapest.get(node.device, price / HOUR))
    return work_dollars(cost, limit, cheapest, stages=stages)


def priced_bound(bound: float, least: float, wanted: Wanted, paid: Economy | None) -> float:
    """Seconds that no plan can beat, from those that none can beat at any price and the dollars that none can undercut:
    for the cost objective, seconds in which this plan's devices cost these."""
    if wanted.objective == "cost" and paid:
        return least / paid.dollars_per_hour * HOUR
    return bound if wanted.most_cost is None else max(bound, least / wanted.most_cost * HOUR)
