"""Rivals with roles: the fastest attention type attends, the others host."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil, floor, inf

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.allowed import micro_batch_counts
from hetermoe_cli.planner.baselines.rival import Overlap, Rival, best, windows, with_schedule
from hetermoe_cli.planner.instance.deal import number, rotate
from hetermoe_cli.planner.instance.device_rates import device_rates
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.schedule_choice import ScheduleChoice


@dataclass(frozen=True)
class Roles:
    """Ranks that attend, and ranks that host."""

    attending: list[int]
    hosting: list[int]


def dist_ep(cost: CostModel, limit: int, *, overlap: Overlap = "none") -> Rival:
    """Attention and experts on different devices, one micro-batch after another; `overlap`: none or parts."""
    if (roles := find_roles(cost)) is None:
        return _no_roles()
    counts = micro_batch_counts(cost.train.global_batch_sequences, limit)
    known: dict[tuple[int, ...], Layout] = {}
    ladders = (_by_placement(cost, roles, rungs[-1:], known, asymmetric=False) for rungs in windows(cost, counts))
    return best(cost, chain.from_iterable(ladders), parts=overlap == "parts")


def gather_squeeze(cost: CostModel, limit: int, *, asymmetric: bool = True) -> Rival:
    """Zebra with the paper's Algorithm 1, or without any expert on attending devices."""
    if (roles := find_roles(cost)) is None:
        return _no_roles()
    counts = micro_batch_counts(cost.train.global_batch_sequences, limit)
    known: dict[tuple[int, ...], Layout] = {}
    ladders = (_by_placement(cost, roles, rungs, known, asymmetric=asymmetric) for rungs in windows(cost, counts))
    return best(cost, chain.from_iterable(ladders))


def _by_placement(
    cost: CostModel,
    roles: Roles,
    ladder: Sequence[ScheduleChoice],
    known: dict[tuple[int, ...], Layout],
    *,
    asymmetric: bool,
) -> list[list[Layout]]:
    """The layouts of a ladder, parted by placement: with less memory in use, Algorithm 1 must give back less.

    `known`: layouts by micro-batches and what the attending ranks take.
    """
    rungs: dict[tuple[int, ...], list[Layout]] = {}
    for schedule in ladder:
        given = offloaded(cost, roles, schedule) if asymmetric else [0] * cost.model.layers
        key = (schedule.micro_batches, *given)
        if key not in known:
            known[key] = split_layout(cost, roles, schedule, given)
        rungs.setdefault(key, []).append(with_schedule(known[key], schedule))
    return list(rungs.values())


def find_roles(cost: CostModel) -> Roles | None:
    """The type with the fastest attention attends, all others host; None where there is one type only."""
    if len(cost.types) < 2:
        return None
    fastest = min(cost.types, key=lambda name: sum(cost.types[name].attention(1)[:2]))
    attending = [device.rank for device in cost.devices if device.type == fastest]
    return Roles(attending, [device.rank for device in cost.devices if device.type != fastest])


def _no_roles() -> Rival:
    return Rival(None, inf, "the cluster has one device type, so no other one to host the experts")


def split_layout(cost: CostModel, roles: Roles, schedule: ScheduleChoice, given: Sequence[int]) -> Layout:
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
    """Algorithm 1 of the paper (arXiv 2504.03871): experts that the attending ranks take together, per layer.

    Nothing where the counts do not divide each other. With several hosting types the slowest counts.
    """
    m, n = len(roles.attending), len(roles.hosting)
    layers, experts = cost.model.layers, cost.model.experts
    if m % n and n % m:
        return [0] * layers
    total = cost.train.global_batch_sequences // schedule.micro_batches
    attention = device_rates(cost, roles.attending[0], ceil(total / m), schedule, total)
    types = {cost.devices[rank].type: rank for rank in roles.hosting}
    hosts = [device_rates(cost, rank, 0, schedule, total) for rank in types.values()]
    taken, given = max(1, n // m), max(1, n // m) * m // n
    time_attention = attention.attention[0]
    time_expert = max(host.hosted[0] for host in hosts) * experts / n
    gather = time_expert - time_attention
    squeeze = (time_expert * given + attention.hosted[0] * experts / n * taken) * n / experts
    if given == 0 or squeeze <= 0:
        return [0] * layers
    least = max(max(0.0, layers * experts / n - host.room(layers, wider=1)) for host in hosts)
    most = max(0.0, attention.room(layers, wider=1)) * m / n
    if gather <= 0:  # no bubble to fill: give up only what does not fit
        scale, gather = ceil(least / given) * squeeze / layers, 1.0
    else:
        scale = min(floor(most / given) * squeeze / (layers * gather), 1.0)
        scale *= max(ceil(least / given) * squeeze / (layers * gather), 1.0)
    return [chunks * given * n for chunks in chunks_of(scale * gather, squeeze, layers, experts // (n * given))]


def chunks_of(bubble: float, squeeze: float, layers: int, most: int) -> list[int]:
    """Chunks moved in each layer: as soon as the bubbles gathered so far hold one."""
    gathered, result = 0.0, []
    for _ in range(layers):
        gathered += bubble
        chunks = min(floor(gathered / squeeze * (1 + 1e-9)), most)
        gathered -= chunks * squeeze
        result.append(chunks)
    return result
