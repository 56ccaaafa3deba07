"""Replay: the simulator's time of a layout, mean over the load's samples, and whether every rank's memory holds it."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.planner.instance.device_rates import device_rates
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.plan import Memory


@dataclass(frozen=True)
class Overflow:
    """A rank's memory against its limit, which it may or may not exceed."""

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
            f"rank {self.rank} ({self.device}) needs {size_text(self.needed)} of {size_text(self.limit)} usable, "
            f"most of it {self.largest_kind}"
        )

    @property
    def largest_kind(self) -> str:
        """The kind of memory that dominates."""
        kinds = {name.removesuffix("_bytes"): value for name, value in self.memory if name != "capacity_bytes"}
        return max(kinds, key=lambda name: kinds[name])


def size_text(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def over_steps(cost: LayoutCost, seconds: Callable[[LayoutCost], float]) -> float:
    """Mean of `seconds` of the layout under every sample of the expert load; under the load where it has none."""
    steps = cost.cost.steps
    if len(steps) == 1:
        return seconds(cost)
    return fmean(seconds(LayoutCost(step, cost.layout)) for step in steps)


def replay_seconds(cost: LayoutCost) -> float:
    """Simulated seconds of an iteration, over_steps."""
    return over_steps(cost, lambda step: simulate(step).seconds)


def typical(cost: LayoutCost) -> LayoutCost:
    """The layout under the sample of the expert load whose replay is closest to the mean; as it is without samples."""
    steps = [LayoutCost(step, cost.layout) for step in cost.cost.steps]
    if len(steps) == 1:
        return cost
    seconds = [simulate(step).seconds for step in steps]
    return min(zip(steps, seconds, strict=True), key=lambda pair: abs(pair[1] - fmean(seconds)))[0]


def usages(cost: LayoutCost) -> Iterator[Overflow]:
    """Every rank's memory against its limit: capacity times the training spec's headroom."""
    known: dict[object, Memory] = {}  # under a balanced router only counts matter
    layout, balanced = cost.layout, cost.cost.shares is None
    for rank, device in enumerate(cost.cost.devices):
        held = tuple([len(placement.experts[rank]) for placement in layout.placement])
        stage = layout.span_of(rank).number
        own = layout.sequences_per_rank[rank], layout.on_shift_at_once(rank)
        key = (device.type, own, layout.head_share(rank), held, stage) if balanced else rank
        if key not in known:
            known[key] = cost.memory(rank)
        memory = known[key]
        limit = memory.capacity_bytes * cost.cost.train.memory_headroom
        yield Overflow(rank, device.type, memory.total_bytes, limit, memory)


def overflow(cost: LayoutCost) -> Overflow | None:
    """The worst rank over its limit, if any."""
    worst = max(usages(cost), key=lambda usage: usage.ratio)
    return worst if worst.needed > worst.limit else None


def busy_bound(cost: LayoutCost, *, exposed: bool = True) -> float:
    """What no replay of the layout can undercut: the busiest rank's compute and what of synchronising follows it; in
    sequential order the transfers as well; and what the busiest link direction carries, one transfer at a time.

    In sequential order every transfer lies between two tasks of each attending rank, and is `exposed`; not if it is cut
    into parts. Of a pipeline nothing is said: a rank has no part in most layers, and no rival is one; nor where heads
    are apart.
    """
    layout, known = cost.layout, {}
    if layout.pipeline or layout.head:
        return 0.0
    transfers = 0.0
    if exposed and layout.schedule.name == "sequential" and layout.schedule.passes == "in_turn":
        there = [cost.transfer(Action(Kind.DISPATCH, Pass.FORWARD, layer)).seconds for layer in range(layout.layers)]
        transfers = 4 * sum(there)
    busiest = 0.0
    for rank, sequences in enumerate(layout.sequences_per_rank):
        key = (cost.cost.devices[rank].type, sequences)
        if key not in known:
            known[key] = device_rates(cost.cost, rank, sequences, layout.schedule, layout.sequences_per_micro_batch)
        r = known[key]
        attention = r.attending(layout.layers) + transfers if sequences else 0.0
        attention *= layout.on_shift(rank) / layout.micro_batches
        busiest = max(busiest, attention + _hosted_seconds(cost, rank, sum(r.hosted)))
    computed = layout.micro_batches * busiest + cost.collective(Kind.REDUCE, 0).seconds
    return max(computed, _carried_seconds(cost) if exposed else 0.0)


def _carried_seconds(cost: LayoutCost) -> float:
    """All dispatches and combines of the link direction that is busy longest with them."""
    layout, busy = cost.layout, defaultdict[int, float](float)
    kinds = product((Kind.DISPATCH, Kind.COMBINE), (Pass.FORWARD, Pass.BACKWARD))
    for (kind, direction), layer, number in product(kinds, range(layout.layers), range(layout.micro_batches)):
        transfer = cost.transfer(Action(kind, direction, layer, number))
        for port in transfer.ports:
            busy[port] += transfer.seconds
    return max(busy.values(), default=0.0)


def _hosted_seconds(cost: LayoutCost, rank: int, balanced: float) -> float:
    """All hosted experts of a rank on one micro-batch, which take `balanced` seconds each where loads are equal."""
    if cost.cost.shares is None:
        return balanced * sum(len(placement.experts[rank]) for placement in cost.layout.placement)
    rows = [count for layer in cost.hosted_rows(rank) for count in layer]
    both = (Pass.FORWARD, Pass.BACKWARD)
    return sum(cost.expert_seconds(rank, Action(Kind.EXPERT, direction), rows) for direction in both)
