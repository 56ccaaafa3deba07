"""Deal: counts per class -> which rank hosts which experts; and whole shares in proportion to speeds."""

from collections.abc import Sequence
from math import floor

from hetermoe_cli.planner.instance.choice import DeviceClass
from hetermoe_cli.planner.instance.counts import Counts
from hetermoe_cli.spec.layout import LayerPlacement


def deal(classes: Sequence[DeviceClass], counts: Counts, world_size: int) -> list[LayerPlacement]:
    """Placement of one set of counts ([layers, classes]).

    Experts are numbered through the ranks, replicated ones last. The devices that get one more of an uneven class
    move on from layer to layer, so that over all layers no device of a class holds two more than another.
    """
    totals = counts.totals([c.count for c in classes])
    shares = [[0] * world_size for _ in range(len(totals))]
    for index, c in enumerate(classes):
        for share, part in zip(shares, rotate([int(total) for total in totals[:, index]], c.count), strict=True):
            for rank, count in zip(c.ranks, part, strict=True):
                share[rank] = count
    return [number(share, int(copies)) for share, copies in zip(shares, counts.replicated, strict=True)]


def rotate(totals: Sequence[int], devices: int) -> list[list[int]]:
    """Split each layer's total over `devices`, uneven by at most one in a layer and in the sum of all layers."""
    first, result = 0, []
    for total in totals:
        base, extra = divmod(total, devices)
        result.append([base + ((place - first) % devices < extra) for place in range(devices)])
        first += extra
    return result


def number(share: Sequence[int], replicated: int) -> LayerPlacement:
    """Contiguous expert numbers for `share[rank]` hosted experts, then the replicated ones."""
    experts: list[list[int]] = []
    first = 0
    for count in share:
        experts.append(list(range(first, first + count)))
        first += count
    return LayerPlacement(experts=experts, replicated=list(range(first, first + replicated)))


def proportional(totals: Sequence[int], speeds: Sequence[float]) -> list[list[int]]:
    """Split each total in proportion to `speeds`; what one split rounds off is carried to the next."""
    everything, owed = sum(speeds), [0.0] * len(speeds)
    result: list[list[int]] = []
    for total in totals:
        owed = [debt + total * speed / everything for debt, speed in zip(owed, speeds, strict=True)]
        share = [max(0, floor(debt + 1e-9)) for debt in owed]
        while sum(share) > total:  # debts of earlier splits fall due together
            some = (i for i, count in enumerate(share) if count)
            share[max(some, key=lambda i: share[i] - owed[i])] -= 1
        left = total - sum(share)
        order = sorted(range(len(share)), key=lambda i: (share[i] - owed[i], -speeds[i]))
        for index in order[:left]:
            share[index] += 1
        owed = [debt - count for debt, count in zip(owed, share, strict=True)]
        result.append(share)
    return result
