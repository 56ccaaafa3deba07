"""Choices for a group: schedules, and sequences per device by comparative advantage, ranked by a quick estimate.

The estimate only says which choices are worth evaluating: a layer lasts as long as the busiest of compute streams
(whole experts levelled over the devices), transfers, and one micro-batch's round trip shared by its window.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import floor, inf
from typing import NamedTuple

from hetermoe_cli.planner.allowed import kept_choices, state_choices
from hetermoe_cli.planner.cluster.parts import Kernels, Part
from hetermoe_cli.planner.search.space import divisors
from hetermoe_cli.spec.schedule_choice import ScheduleChoice

LEVEL_STEPS = 30


class Share(NamedTuple):
    """Devices of one node group that attend to the same number of sequences."""

    kind: int
    devices: int
    sequences: int


@dataclass(frozen=True)
class Option:
    """A choice in short, with its estimated seconds."""

    seconds: float
    schedule: ScheduleChoice
    shares: tuple[Share, ...]


def options(part: Part, kernels: Kernels, sequences: int, counts: Iterable[int]) -> list[Option]:
    """All options of so many micro-batches that memory allows, the best estimate first."""
    found: list[Option] = []
    for count in counts:
        total = sequences // count
        ways = list(sequence_shares(part, kernels, total))
        for window, shares in product(divisors(count), ways):
            found += _schedules(part, kernels, count, window, shares)
    return sorted(found, key=lambda option: option.seconds)


def _schedules(part: Part, kernels: Kernels, count: int, window: int, shares: tuple[Share, ...]) -> Iterator[Option]:
    """What to recompute and how to hold the dense part: what saves memory only where memory limits the placement."""
    for state in state_choices(kernels.cost):
        for recompute in [again for again, kept in kept_choices(kernels.cost) if kept == state]:
            schedule = kernels.cost.schedule(count, window, recompute, state)
            found = estimate(part, kernels, schedule, shares)
            if found.seconds < inf:
                yield Option(found.seconds, schedule, shares)
            if not found.limited:
                return


def sequence_shares(part: Part, kernels: Kernels, total: int) -> Iterator[tuple[Share, ...]]:
    """Ways to share out a micro-batch: the kinds best at attention attend, levelled or in proportion to their speed."""
    schedule = ScheduleChoice(micro_batches=1, window=1)
    attention, expert = {}, {}
    for kind in part.kinds:
        usual = max(1, total // part.world_size)
        rates = kernels.rates(kind, usual, schedule, max(total, usual), 1, part.groups)
        attention[kind] = rates.attending(kernels.cost.model.layers) / usual
        expert[kind] = kernels.cost.model.layers * sum(rates.hosted)
    order = sorted(part.kinds, key=lambda kind: attention[kind] / expert[kind])
    seen: set[tuple[Share, ...]] = set()
    for size in range(1, len(order) + 1):
        chosen = order[:size]
        speed = {kind: part.composition[kind] / attention[kind] for kind in chosen}
        wanted = [{kind: total * speed[kind] / sum(speed.values()) for kind in chosen}]
        wanted.append(_levelled(part, kernels, chosen, attention, expert, total))
        for amounts in wanted:
            for whole in _rounded(part, amounts, total):
                shares = tuple(
                    share for kind in part.kinds for share in _split(kind, part.composition[kind], whole.get(kind, 0))
                )
                if shares not in seen:
                    seen.add(shares)
                    yield shares


def _levelled(
    part: Part,
    kernels: Kernels,
    chosen: Sequence[int],
    attention: dict[int, float],
    expert: dict[int, float],
    total: int,
) -> dict[int, float]:
    """Sequences by the work program: all kinds end together, all but the last of `chosen` only attend."""
    seconds = _work_seconds(part, kernels, attention, expert, chosen, total)
    result, left = {}, float(total)
    for kind in chosen:
        result[kind] = min(left, part.composition[kind] * seconds / attention[kind])
        left -= result[kind]
    result[chosen[-1]] += left
    return result


def _work_seconds(
    part: Part,
    kernels: Kernels,
    attention: dict[int, float],
    expert: dict[int, float],
    chosen: Sequence[int],
    total: int,
) -> float:
    low, high = 0.0, sum(attention[kind] * total + expert[kind] * kernels.cost.model.experts for kind in part.kinds)
    for _ in range(LEVEL_STEPS):
        middle = (low + high) / 2
        left, experts = float(total), float(kernels.cost.model.experts)
        for kind in [*chosen, *(k for k in part.kinds if k not in chosen)]:
            time = part.composition[kind] * middle
            attended = min(left, time / attention[kind]) if kind in chosen else 0.0
            left -= attended
            experts -= (time - attended * attention[kind]) / expert[kind]
        low, high = (low, middle) if left <= 0 and experts <= 0 else (middle, high)
    return high


def _rounded(part: Part, amounts: dict[int, float], total: int) -> Iterator[dict[int, int]]:
    """Whole sequences per kind: every device of a kind alike but for one kind, which takes the rest; or nearest."""
    for absorber in amounts:
        result = {
            kind: part.composition[kind] * round(amount / part.composition[kind])
            for kind, amount in amounts.items()
            if kind != absorber
        }
        rest = total - sum(result.values())
        if rest >= 0:
            yield {**result, absorber: rest}
    whole = {kind: floor(amount) for kind, amount in amounts.items()}
    for kind in sorted(amounts, key=lambda k: whole[k] - amounts[k])[: total - sum(whole.values())]:
        whole[kind] += 1
    if sum(whole.values()) == total:
        yield whole


def _split(kind: int, devices: int, sequences: int) -> list[Share]:
    """Uneven by one at most."""
    base, extra = divmod(sequences, devices)
    shares = [Share(kind, extra, base + 1), Share(kind, devices - extra, base)]
    return [share for share in shares if share.devices]


class Estimate(NamedTuple):
    """Rough seconds, infinite where memory does not hold it; and whether more memory would change anything."""

    seconds: float
    limited: bool


def estimate(part: Part, kernels: Kernels, schedule: ScheduleChoice, shares: Sequence[Share]) -> Estimate:
    """A choice's seconds from rates alone, no placement made."""
    model = kernels.cost.model
    total = sum(share.devices * share.sequences for share in shares)
    attending = sum(share.devices for share in shares if share.sequences)
    rates = [kernels.rates(s.kind, s.sequences, schedule, total, attending, part.groups) for s in shares]
    if any(share.sequences and not r.fits for r, share in zip(rates, shares, strict=True)):
        return Estimate(inf, True)
    rooms = [max(0.0, r.room(model.layers)) / model.layers for r in rates]
    if sum(share.devices * room for share, room in zip(shares, rooms, strict=True)) < model.experts:
        return Estimate(inf, True)
    base = [
        r.attending(model.layers) / model.layers if s.sequences else 0.0 for r, s in zip(rates, shares, strict=True)
    ]
    each = [
        max(sum(r.hosted), 2 * _moved_seconds(part, kernels, share, total))
        for r, share in zip(rates, shares, strict=True)
    ]
    layer = _layer_seconds(shares, base, each, rooms, model.experts)
    counts = [
        min(floor((layer - b) / e + 1e-9), room) if layer > b else 0.0
        for b, e, room in zip(base, each, rooms, strict=True)
    ]
    transfer, contended = _transfer_seconds(part, kernels, shares, counts, total)
    slowest = max(b for b, s in zip(base, shares, strict=True) if s.sequences)
    hosting = max((count * e for count, e in zip(counts, each, strict=True)), default=0.0)
    more = int(schedule.sends_again)
    trip = slowest + hosting + (4 + more) * transfer
    busy = max(layer, ((4 if contended else 2) + more) * transfer, trip / schedule.window)
    step = max(r.optimizer_base + r.optimizer_per_expert * c * model.layers for r, c in zip(rates, counts, strict=True))
    windows = schedule.micro_batches // schedule.window
    gathers = _gather_seconds(kernels, shares, windows) if schedule.dense_state == "full" else 0.0
    seconds = schedule.micro_batches * model.layers * busy + windows * trip + step + gathers
    limited = any(room < (layer - b) / e + 1 for b, e, room in zip(base, each, rooms, strict=True))
    return Estimate(seconds, limited)


def _gather_seconds(kernels: Kernels, shares: Sequence[Share], windows: int) -> float:
    """About what CostModel.sharding_seconds says of a large group."""
    devices = [kernels.cost.devices[2 * share.kind] for share in shares if share.sequences]
    slowest = min(device.network.ring_bandwidth for device in devices)
    return (3 * windows - 1) * kernels.cost.dense_gradient_bytes / slowest


def _layer_seconds(
    shares: Sequence[Share], base: Sequence[float], each: Sequence[float], rooms: Sequence[float], experts: int
) -> float:
    """Least seconds of a layer and micro-batch in which whole experts per device find a place."""
    low, high = 0.0, max(base) + experts * max(each)
    for _ in range(LEVEL_STEPS):
        middle = (low + high) / 2
        place = sum(
            share.devices * min(floor((middle - b) / e + 1e-9), room)
            for share, b, e, room in zip(shares, base, each, rooms, strict=True)
            if middle > b
        )
        low, high = (low, middle) if place >= experts else (middle, high)
    return max(high, *base)


def _moved_seconds(part: Part, kernels: Kernels, share: Share, total: int) -> float:
    """Seconds in which all rows for one expert on each device reach its node."""
    if part.world_size == min(part.node(share.kind).devices, part.composition[share.kind]):
        return 0.0
    usual = kernels.cost.travelling_share(kernels.cost.model.experts / part.world_size)
    rows = kernels.cost.rows_per_expert(total) * kernels.cost.row_bytes * usual
    device = kernels.cost.devices[2 * share.kind]
    return rows * _behind(part, share.kind) / device.network.bandwidth_gigabytes_per_second / 1e9


def _behind(part: Part, kind: int) -> float:
    """Devices behind each of a node's NICs."""
    node = part.node(kind)
    devices = min(node.devices, part.composition[kind])
    return devices / min(node.nics, devices)


def _transfer_seconds(
    part: Part, kernels: Kernels, shares: Sequence[Share], counts: Sequence[float], total: int
) -> tuple[float, bool]:
    """Seconds of a dispatch, and whether some device both sends and receives in it."""
    cost, longest, contended = kernels.cost, 0.0, False
    rows = cost.rows_per_expert(1) * cost.row_bytes
    hosts = sum(share.devices for share, count in zip(shares, counts, strict=True) if count)
    usual = cost.travelling_share(cost.model.experts / max(hosts, 1))
    outside = 1 - max(part.node(kind).devices for kind in part.kinds) / part.world_size
    for share, count in zip(shares, counts, strict=True):
        device, behind = cost.devices[2 * share.kind], _behind(part, share.kind)
        here, away = cost.travelling_share(count) * count * total, usual * share.sequences * cost.model.experts
        moved = max(here, away) * rows * behind
        outer = max(0.0, outside) * moved / device.network.bandwidth_gigabytes_per_second
        inner = (1 - max(0.0, outside)) * moved / behind / device.interconnect.bandwidth_gigabytes_per_second
        longest = max(longest, max(outer, inner) / 1e9 + device.network.latency_microseconds * 1e-6)
        contended |= bool(share.sequences and count)
    return longest if part.world_size > 1 else 0.0, contended
