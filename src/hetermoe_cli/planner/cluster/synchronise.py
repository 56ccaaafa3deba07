"""Data parallelism over groups: what it takes to make all copies of every parameter agree.

Layer by layer, during backward, dense gradients (and those of replicated experts) go round one ring through all
attending ranks of all groups. Each hosted expert goes round a ring of its hosts, one in every group; all these rings
run at once, and ranks behind one NIC share it. Upper estimates: every message between groups is charged to the NICs,
even where two groups share a node; a replicated expert is charged as if it were replicated in all groups. What a fully
sharded dense part gathers and scatters before is within a group, and part of its replay. Gradients of shared out states
are scattered, half as long, and new weights go the same ways during the next forward pass, half as long.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetermoe_cli.cost.model import CostModel, scattered
from hetermoe_cli.planner.cluster.evaluate import Evaluated
from hetermoe_cli.planner.cluster.parts import Part
from hetermoe_cli.spec.layout import Layout


@dataclass(frozen=True)
class Copy:
    """One group's layout on `ranks` of the whole cluster, with the costs of its own devices."""

    layout: Layout
    ranks: Sequence[int]
    cost: CostModel

    def attending_at(self, layer: int) -> list[int]:
        """Ranks of the whole cluster that attend in a layer; model.layers: that compute the head."""
        return [self.ranks[local] for local in self.layout.attending_at(layer)]


def _attending(copies: Sequence[Copy], layer: int) -> list[int]:
    """Ranks of all groups that attend in a layer, in the order of their ring."""
    return sorted(rank for copy in copies for rank in copy.attending_at(layer))


def reduce_seconds(whole: CostModel, copies: Sequence[Copy], layer: int) -> float:
    """Summing one layer's gradients over all groups; model.layers: the head's."""
    dense, experts = _scattered(copies)
    return _sum_seconds(whole, copies, layer, whole.segment_parameters(layer), whole.gradient_bytes, dense, experts)


def _scattered(copies: Sequence[Copy]) -> tuple[float, float]:
    """Bytes that summing gradients moves, in those of an all-reduce: for what all who attend hold, and hosted experts.

    A fully sharded dense part is cut within groups: over all of them it is all-reduced, with replicated experts.
    """
    schedules = [copy.layout.schedule for copy in copies]
    experts = max(map(scattered, schedules))
    return (experts if all(s.dense_state == "optimizer" for s in schedules) else 1.0), experts


def _sum_seconds(
    whole: CostModel,
    copies: Sequence[Copy],
    layer: int,
    parameters: int,
    width: int,
    dense: float = 1.0,
    experts: float = 1.0,
) -> float:
    """All-reduce of `width` bytes for each of a layer's `parameters` outside of experts and those of its experts, or
    the parts `dense` and `experts` of it."""
    attending, hosted = _attending(copies, layer), {}
    if layer < whole.model.layers:
        placements = [(copy, copy.layout.placement[layer]) for copy in copies]
        parameters += max(len(placement.replicated) for _, placement in placements) * whole.model.expert_parameters
        hosted = {
            rank: len(experts)
            for copy, placement in placements
            for rank, experts in zip(copy.ranks, placement.experts, strict=True)
        }
    # no message, no latency
    ring = dense * whole.network.all_reduce_seconds(attending, parameters * width) if parameters else 0.0
    return ring + expert_seconds(whole, hosted, len(copies), experts, width)


def collective_ports(whole: CostModel, copies: Sequence[Copy], copy: Copy) -> list[tuple[int, ...]]:
    """Of every layer and the head: which ports of its own a group gives to sums and gathers, those of the ring through
    all groups and the NICs of its hosts."""
    rings, known = [], {}
    for layer in range(whole.model.layers + 1):
        attending = tuple(_attending(copies, layer))
        if attending not in known:
            known[attending] = _ring_of(whole, attending, copy)
        rings.append(known[attending])
    network, devices = copy.cost.network, copy.cost.devices
    hosts = [*(copy.layout.hosting(layer) for layer in range(copy.layout.layers)), []]
    nics = [{network.port(devices[rank].nic, False, way) for rank in ranks for way in (0, 1)} for ranks in hosts]
    return [tuple(sorted(ring | more)) for ring, more in zip(rings, nics, strict=True)]


def _ring_of(whole: CostModel, attending: Sequence[int], copy: Copy) -> set[int]:
    """Ports of a group's own that a ring through ranks of the whole cluster passes."""
    used = {(*whole.network.owner(port), port % 2) for port in whole.network.ring_ports(attending)}
    network, devices = copy.cost.network, copy.cost.devices
    return {
        network.port(own, inside, way)
        for local, rank in enumerate(copy.ranks)
        for own, number, inside in ((devices[local].nic, whole.devices[rank].nic, False), (local, rank, True))
        for way in (0, 1)
        if (number, inside, way) in used
    }


def gather_seconds(whole: CostModel, copies: Sequence[Copy], layer: int) -> float:
    """Gathering one layer's new weights over all groups, where they share out its states; model.layers: the head's.

    A fully sharded dense part is gathered within its group.
    """
    states = {copy.layout.schedule.dense_state for copy in copies}
    if "replicated" in states:
        return 0.0
    ranks = [rank for copy in copies for rank in copy.ranks]
    dense = whole.segment_parameters(layer) if states == {"optimizer"} else 0
    return _sum_seconds(whole, copies, layer, dense, whole.weight_bytes(ranks)) / 2


def expert_seconds(
    whole: CostModel, hosted: Mapping[int, float], groups: int, share: float = 1.0, width: int | None = None
) -> float:
    """All-reduce of every expert over its hosts in `groups` groups, or a `share` of it.

    `hosted`: experts on each rank; `width`: bytes for each parameter, of a gradient unless given.
    """
    if groups < 2:
        return 0.0
    behind: dict[int, float] = defaultdict(float)
    for rank, count in hosted.items():
        behind[whole.devices[rank].nic] += count
    links = {device.nic: device.network for device in whole.devices}
    rounds = share * 2 * (groups - 1)
    moved = rounds / groups * whole.model.expert_parameters * (width or whole.gradient_bytes)
    return max(
        (
            count * moved / links[nic].ring_bandwidth + rounds * links[nic].latency_microseconds * 1e-6
            for nic, count in behind.items()
            if count
        ),
        default=0.0,
    )


def expected_seconds(part: Part, found: Evaluated, groups: int) -> float:
    """What synchronising takes if all of `groups` groups were like this one, and it began after all compute: an upper
    estimate, known before they are chosen."""
    cost, attending = part.any_cost, found.attending
    hosted = {rank: float(share) for c, share in zip(found.classes, found.hosted, strict=True) for rank in c.ranks}
    schedule = found.choice.schedule
    result = cost.synchronise_seconds(schedule, attending, found.replicated)
    if groups > 1:
        slowest = max(1 / cost.devices[rank].network.ring_bandwidth for rank in attending)
        size = cost.dense_gradient_bytes + found.replicated * cost.expert_gradient_bytes
        members = len(attending) * groups
        ring = 2 * (members - 1) / members * size * slowest
        result = max(result, ring + cost.sharding_seconds(schedule, attending))
    return result + expert_seconds(cost, hosted, groups)
