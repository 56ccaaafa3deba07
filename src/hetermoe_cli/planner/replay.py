"""Replay: the simulator's time of a layout, and whether every rank's memory holds it."""

from dataclasses import dataclass

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.planner.rates import device_rates
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.spec.plan import Memory


@dataclass(frozen=True)
class Overflow:
    """The rank that misses most memory, as a share of its limit."""

    rank: int
    device: str
    needed: int
    limit: float
    memory: Memory

    @property
    def ratio(self) -> float:
        """Needed over available."""
        return self.needed / self.limit

    def __str__(self) -> str:
        return (
            f"rank {self.rank} ({self.device}) needs {self.needed / 1e9:.2f} GB of {self.limit / 1e9:.2f} GB usable, "
            f"most of it {self.largest_kind}"
        )

    @property
    def largest_kind(self) -> str:
        """The kind of memory that dominates."""
        kinds = {name.removesuffix("_bytes"): value for name, value in self.memory if name != "capacity_bytes"}
        return max(kinds, key=lambda name: kinds[name])


def overflow(cost: LayoutCost) -> Overflow | None:
    """The worst rank over its limit (capacity times the training spec's headroom), if any."""
    worst: Overflow | None = None
    for rank, device in enumerate(cost.cost.devices):
        memory = cost.memory(rank)
        limit = memory.capacity_bytes * cost.cost.train.memory_headroom
        found = Overflow(rank, device.type, memory.total_bytes, limit, memory)
        if memory.total_bytes > limit and (worst is None or found.ratio > worst.ratio):
            worst = found
    return worst


def busy_bound(cost: LayoutCost) -> float:
    """What no replay of the layout can undercut: the busiest rank's compute, and in sequential order the transfers.

    In sequential order every transfer lies between two tasks of each attending rank.
    """
    layout, known = cost.layout, {}
    hosted = [sum(len(placement.experts[rank]) for placement in layout.placement) for rank in range(layout.world_size)]
    transfers = 0.0
    if layout.schedule.name == "sequential":
        there = [cost.transfer(Action(Kind.DISPATCH, Pass.FORWARD, layer)).seconds for layer in range(layout.layers)]
        transfers = 4 * sum(there)
    busiest = 0.0
    for rank, sequences in enumerate(layout.sequences_per_rank):
        key = (cost.cost.devices[rank].type, sequences)
        if key not in known:
            known[key] = device_rates(cost.cost, rank, sequences, layout.schedule, layout.sequences_per_micro_batch)
        r = known[key]
        attention = layout.layers * sum(r.attention) + r.head + transfers if sequences else 0.0
        busiest = max(busiest, attention + hosted[rank] * sum(r.hosted))
    return layout.micro_batches * busiest + cost.synchronise_seconds
