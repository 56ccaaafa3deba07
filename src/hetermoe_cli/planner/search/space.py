"""The searched space: every schedule, R, recompute and number of sequences per device, up to symmetry."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations as selections
from itertools import product

import numpy as np

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.allowed import kept_choices, micro_batch_counts
from hetermoe_cli.planner.arrays import FloatArray, IntArray
from hetermoe_cli.planner.instance.choice import symmetry_keys
from hetermoe_cli.spec.cluster import Device
from hetermoe_cli.spec.schedule_choice import ScheduleChoice

DEVICE_LEVEL_LIMIT = 8  # up to so many devices the search is over single devices
MOST_COMBINATIONS = 40_000  # of one schedule; beyond that over classes


def kinds(devices: Sequence[Device]) -> list[list[int]]:
    """Ranks by symmetry of the cluster, before any sequences are given out."""
    members: dict[object, list[int]] = defaultdict(list)
    for rank, key in enumerate(symmetry_keys(devices, [0] * len(devices))):
        members[key].append(rank)
    return list(members.values())


def schedules(cost: CostModel, limit: int) -> list[ScheduleChoice]:
    """Those of every R."""
    counts = micro_batch_counts(cost.train.global_batch_sequences, limit)
    return [schedule for count in counts for schedule in schedules_of(cost, count)]


def schedules_of(cost: CostModel, count: int) -> list[ScheduleChoice]:
    """Every window, recompute and dense state of so many micro-batches; experts and transfers in the default order."""
    return [
        cost.schedule(count, window, recompute, dense_state)
        for window in divisors(count)
        for recompute, dense_state in kept_choices(cost)
    ]


def divisors(number: int) -> list[int]:
    """Largest first."""
    return [d for d in range(number, 0, -1) if number % d == 0]


def splits(total: int, least: int, most: int, devices: int, *, whole: bool) -> list[tuple[int, ...]]:
    """Descending sequences per device of one kind: `least` to `total` together, `most` each.

    All of them if `whole`; else the kind is split in at most two, that differ by one sequence or of which one attends.
    """
    if whole:
        return list(_partitions(total, least, most, devices))
    found: set[tuple[int, ...]] = set()
    for high in range(most + 1):
        for low in {0, max(0, high - 1)}:
            for count in range(1, devices + 1):
                if least <= high * count + low * (devices - count) <= total:
                    found.add((high,) * count + (low,) * (devices - count))
    return sorted(found, reverse=True)


def _partitions(total: int, least: int, most: int, devices: int) -> Iterator[tuple[int, ...]]:
    if devices == 0:
        yield ()
        return
    for first in range(min(total, most), -1, -1):
        if first * devices < least:
            return
        for rest in _partitions(total - first, least - first, first, devices - 1):
            yield (first, *rest)


def count_whole(total: int, kinds: Sequence[tuple[int, int]]) -> float:
    """How many combinations of whole splits there are; `kinds`: (most sequences of a device, devices)."""
    return _count(total, [_count_partitions(total, most, devices) for most, devices in kinds])


def count_combinations(total: int, sums: Sequence[IntArray]) -> float:
    """How many rows `combinations` would look at, at its largest."""
    tables = [np.bincount(amounts, minlength=total + 1)[: total + 1].astype(np.float64) for amounts in sums]
    return max(_count(total, [*tables[:kind], np.ones(total + 1)]) for kind in range(1, len(tables) + 1))


def _count(total: int, tables: Sequence[FloatArray]) -> float:
    ways = np.eye(1, total + 1)[0]
    for table in tables:
        ways = np.convolve(ways, table)[: total + 1]
    return float(ways[total])


def _count_partitions(total: int, most: int, devices: int) -> FloatArray:
    """[total + 1] partitions of each sum into at most `devices` parts of at most `most`."""
    ways = np.zeros((devices + 1, total + 1))
    ways[0, 0] = 1
    for part in range(1, most + 1):
        for used in range(1, devices + 1):
            ways[used, part:] += ways[used - 1, : total + 1 - part]
    result: FloatArray = ways.sum(0)
    return result


def combinations(total: int, sums: Sequence[IntArray]) -> IntArray:
    """[rows, kinds] one option per kind, by its number, `total` sequences together; `sums` of the options, by kind."""
    rows, reached = np.zeros((1, 0), dtype=np.int64), np.zeros(1, dtype=np.int64)
    for kind, amounts in enumerate(sums):
        added = reached[:, None] + amounts[None, :]
        wanted = added == total if kind == len(sums) - 1 else added <= total
        before, option = np.nonzero(wanted)
        rows, reached = np.hstack([rows[before], option[:, None]]), added[before, option]
    return rows


def assign(members: Sequence[Sequence[int]], parts: Sequence[Sequence[int]], world: int) -> tuple[int, ...]:
    """Sequences per rank, each kind's numbers in the order of its ranks."""
    sequences = [0] * world
    for ranks, part in zip(members, parts, strict=True):
        for rank, count in zip(ranks, part, strict=True):
            sequences[rank] = count
    return tuple(sequences)


def arrangements(devices: Sequence[Device], sequences: Sequence[int]) -> list[tuple[int, ...]]:
    """The same numbers given to devices of one kind in every way that the network tells apart.

    Where every device has a node of its own there is one way. With more than DEVICE_LEVEL_LIMIT devices two ways are
    tried: neighbours alike, and neighbours apart.
    """
    if len({device.node for device in devices}) == len(devices):
        return [tuple(sequences)]
    members = kinds(devices)
    parts = [sorted((sequences[rank] for rank in ranks), reverse=True) for ranks in members]
    if len(devices) > DEVICE_LEVEL_LIMIT:
        return list(dict.fromkeys(assign(order, parts, len(devices)) for order in (members, _apart(devices, members))))
    found: dict[object, tuple[int, ...]] = {}
    on_nics = [
        [[rank for rank in ranks if devices[rank].nic == nic] for nic in _nics(devices, ranks)] for ranks in members
    ]
    ways = [
        list(_shares(tuple(part), [len(group) for group in groups]))
        for part, groups in zip(parts, on_nics, strict=True)
    ]
    for way in product(*ways):
        groups = [group for kind in on_nics for group in kind]
        shares = [share for kind in way for share in kind]
        arranged = assign(groups, shares, len(devices))
        found.setdefault(_canonical(devices, arranged), arranged)
    return list(found.values())


def _nics(devices: Sequence[Device], ranks: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(devices[rank].nic for rank in ranks))


def _shares(part: tuple[int, ...], sizes: Sequence[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every way to split `part` into groups of `sizes`; the order within a group does not count."""
    if not sizes:
        yield ()
        return
    for share in sorted(set(selections(part, sizes[0])), reverse=True):
        rest = list(part)
        for number in share:
            rest.remove(number)
        yield from ((share, *others) for others in _shares(tuple(rest), sizes[1:]))


def _canonical(devices: Sequence[Device], sequences: Sequence[int]) -> object:
    """Equal for arrangements that some renumbering of equal nodes, NICs and devices maps onto each other."""
    nics: dict[tuple[int, int], list[object]] = defaultdict(list)
    for device in devices:
        nics[device.node, device.nic].append(
            (repr(device.network), repr(device.interconnect), device.type, sequences[device.rank])
        )
    nodes: dict[int, list[object]] = defaultdict(list)
    for (node, _), inside in nics.items():
        nodes[node].append(tuple(sorted(inside)))  # type: ignore[type-var]
    return tuple(sorted(tuple(sorted(inside)) for inside in nodes.values()))  # type: ignore[type-var]


def _apart(devices: Sequence[Device], members: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each kind's ranks in turn over its nodes."""
    place = {
        rank: sum(devices[other].node == devices[rank].node for other in ranks if other < rank)
        for ranks in members
        for rank in ranks
    }
    return [sorted(ranks, key=lambda rank: (place[rank], rank)) for ranks in members]
