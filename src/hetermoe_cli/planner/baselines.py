"""Rival layouts under the same cost model, memory check and simulator (definitions: planner.md, paper.md section 3).

ep: every device attends to equal sequences and hosts equal experts, uneven by one; best R, schedule, recompute.
dist_ep: the fastest attention type attends, the others host; sequential, R = 1.
gather_squeeze: the same roles, zebra, Algorithm 1 moves experts back; best R and recompute.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf
from typing import get_args

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.deal import number, rotate
from hetermoe_cli.planner.rates import ClassRates, device_rates
from hetermoe_cli.planner.replay import Overflow, busy_bound, overflow
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.plan import Baseline, LayerPlacement, Layout, ScheduleChoice
from hetermoe_cli.spec.train import Recompute


@dataclass(frozen=True)
class Rival:
    """The best layout of a rival method and its replay, or why there is none."""

    layout: Layout | None
    seconds: float
    reason: str = ""

    def baseline(self) -> Baseline:
        """What a plan stores."""
        if self.layout is None:
            return Baseline(iteration_seconds=None, reason=self.reason)
        return Baseline(iteration_seconds=self.seconds, schedule=self.layout.schedule)


def micro_batch_counts(batch: int, limit: int) -> list[int]:
    """Every R that cuts `batch` sequences into equal micro-batches."""
    return [count for count in range(1, min(batch, limit) + 1) if batch % count == 0]


def recompute_choices(cost: CostModel) -> list[Recompute]:
    """What the training spec allows, cheapest first."""
    wanted = cost.train.recompute
    return list(get_args(Recompute)) if wanted == "auto" else [wanted]


def ep(cost: CostModel, limit: int) -> Rival:
    """Expert parallelism over all devices: each attends to a sequence at least, if some such layout fits."""
    everyone = _best(cost, _ep_layouts(cost, limit, everyone=True))
    return everyone if everyone.layout else _best(cost, _ep_layouts(cost, limit, everyone=False))


def dist_ep(cost: CostModel, limit: int) -> Rival:
    """Attention and experts on different devices, nothing overlapped."""
    if (roles := _roles(cost)) is None:
        return _no_roles()
    schedules = [ScheduleChoice.sequential(1, recompute=r) for r in recompute_choices(cost)]
    return _best(cost, (_split_layout(cost, roles, schedule, [0] * cost.model.layers) for schedule in schedules))


def gather_squeeze(cost: CostModel, limit: int) -> Rival:
    """Zebra with the paper's Algorithm 1."""
    if (roles := _roles(cost)) is None:
        return _no_roles()
    schedules = [
        ScheduleChoice.zebra(count, recompute=recompute)
        for count in micro_batch_counts(cost.train.global_batch_sequences, limit)
        for recompute in recompute_choices(cost)
    ]
    return _best(cost, (_split_layout(cost, roles, s, offloaded(cost, roles, s)) for s in schedules))


RIVALS = {"ep": ep, "dist_ep": dist_ep, "gather_squeeze": gather_squeeze}


def _ep_layouts(cost: CostModel, limit: int, *, everyone: bool) -> Iterator[Layout]:
    world, model, batch = len(cost.devices), cost.model, cost.train.global_batch_sequences
    placement = [number(share, 0) for share in rotate([model.experts] * model.layers, world)]
    orders = (ScheduleChoice.zebra, ScheduleChoice.sequential)
    for count in micro_batch_counts(batch, limit):
        if everyone and batch // count < world:
            continue
        for order in orders[: 1 if count == 1 else 2]:  # with one micro-batch both are the same order
            for recompute in recompute_choices(cost):
                schedule = order(count, recompute=recompute)
                sequences = rotate([batch // count], world)[0]
                yield Layout(schedule=schedule, sequences_per_rank=sequences, placement=placement)


@dataclass(frozen=True)
class Roles:
    """Ranks that attend, and ranks that host."""

    attending: list[int]
    hosting: list[int]


def _roles(cost: CostModel) -> Roles | None:
    """The type with the fastest attention attends, all others host; None where there is one type only."""
    if len(cost.types) < 2:
        return None
    fastest = min(cost.types, key=lambda name: sum(cost.types[name].attention(1)[:2]))
    attending = [device.rank for device in cost.devices if device.type == fastest]
    return Roles(attending, [device.rank for device in cost.devices if device.type != fastest])


def _no_roles() -> Rival:
    return Rival(None, inf, "the cluster has one device type, so no other one to host the experts")


def _split_layout(cost: CostModel, roles: Roles, schedule: ScheduleChoice, given: Sequence[int]) -> Layout:
    """Roles apart; of layer l the attending ranks take `given[l]` experts together."""
    world, total = len(cost.devices), cost.train.global_batch_sequences // schedule.micro_batches
    sequences = [0] * world
    for rank, count in zip(roles.attending, rotate([total], len(roles.attending))[0], strict=True):
        sequences[rank] = count
    back = rotate(given, len(roles.attending))
    kept = rotate([cost.model.experts - count for count in given], len(roles.hosting))
    placement: list[LayerPlacement] = []
    for taken, left in zip(back, kept, strict=True):
        share = dict(zip(roles.attending, taken, strict=True)) | dict(zip(roles.hosting, left, strict=True))
        placement.append(number([share[rank] for rank in range(world)], 0))
    return Layout(schedule=schedule, sequences_per_rank=sequences, placement=placement)


def offloaded(cost: CostModel, roles: Roles, schedule: ScheduleChoice) -> list[int]:
    """Algorithm 1 (paper.md section 3): experts that the attending ranks take together, per layer.

    Nothing where the counts do not divide each other. With several hosting types the slowest counts.
    """
    m, n = len(roles.attending), len(roles.hosting)
    layers, experts = cost.model.layers, cost.model.experts
    if m % n and n % m:
        return [0] * layers
    total = cost.train.global_batch_sequences // schedule.micro_batches
    attention = device_rates(cost, roles.attending[0], ceil(total / m), schedule, total)
    hosts = [device_rates(cost, rank, 0, schedule, total) for rank in roles.hosting]
    taken, given = max(1, n // m), max(1, n // m) * m // n
    time_attention = attention.attention[0]
    time_expert = max(host.hosted[0] for host in hosts) * experts / n
    gather = time_expert - time_attention
    squeeze = (time_expert * given + attention.hosted[0] * experts / n * taken) * n / experts
    if given == 0 or squeeze <= 0:
        return [0] * layers
    least = max(max(0.0, layers * experts / n - _capacity(host)) for host in hosts)
    most = max(0.0, _capacity(attention)) * m / n
    if gather <= 0:  # no bubble to fill: give up only what does not fit
        scale, gather = ceil(least / given) * squeeze / layers, 1.0
    else:
        scale = min(floor(most / given) * squeeze / (layers * gather), 1.0)
        scale *= max(ceil(least / given) * squeeze / (layers * gather), 1.0)
    return [chunks * given * n for chunks in _chunks(scale * gather, squeeze, layers, experts // (n * given))]


def _chunks(bubble: float, squeeze: float, layers: int, most: int) -> list[int]:
    """Chunks moved in each layer: as soon as the bubbles gathered so far hold one."""
    gathered, result = 0.0, []
    for _ in range(layers):
        gathered += bubble
        chunks = min(floor(gathered / squeeze * (1 + 1e-9)), most)
        gathered -= chunks * squeeze
        result.append(chunks)
    return result


def _capacity(rates: ClassRates) -> float:
    """Experts that a device's memory holds over all layers."""
    return (rates.memory_limit - rates.memory_base - rates.memory_if_any) / rates.memory_per_hosted


def _best(cost: CostModel, layouts: Iterable[Layout]) -> Rival:
    """The fastest layout that fits; those that cannot win are not replayed."""
    fitting: list[tuple[float, LayoutCost]] = []
    worst: Overflow | None = None
    for layout in layouts:
        layout_cost = LayoutCost(cost, layout)
        found = overflow(layout_cost)
        if found is None:
            fitting.append((busy_bound(layout_cost), layout_cost))
        elif worst is None or found.ratio < worst.ratio:
            worst = found
    best, seconds = None, inf
    for bound, layout_cost in sorted(fitting, key=lambda pair: pair[0]):
        if bound < seconds and (replayed := simulate(layout_cost).seconds) < seconds:
            best, seconds = layout_cost.layout, replayed
    return Rival(best, seconds, "" if best else f"does not fit: {worst}")
