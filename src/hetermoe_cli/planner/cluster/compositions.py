"""Compositions: what a group may hold, as devices of every node group; and which ranks that is."""

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from math import prod

from hetermoe_cli.spec.cluster import ClusterSpec, NodeGroup

Composition = tuple[int, ...]  # devices of each of the cluster's node groups

EVERY = 400  # if there are no more, all compositions are looked at
SHARES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)  # a node group's parts


def amounts(node: NodeGroup) -> list[int]:
    """Devices of a node group that a group may hold beside others: whole nodes, or parts where no NIC is shared.

    Parts are a node's devices divided by its prime factors one after another, so that they never straddle two nodes.
    """
    parts = _parts(node.devices) if node.nics == node.devices else []
    return [0, *parts, *(count * node.devices for count in range(1, node.count + 1))]


def _parts(devices: int) -> list[int]:
    result, size = [], devices
    while size > 1:
        size //= next(factor for factor in range(2, size + 1) if size % factor == 0)
        result.append(size)
    return sorted(result)


def compositions(cluster: ClusterSpec) -> list[Composition]:
    """All of them where there are few; else equal parts of one, two or all node groups, of two also unequal parts."""
    kinds = len(cluster.nodes)
    options = [amounts(node) for node in cluster.nodes]
    if prod(map(len, options)) <= EVERY:
        found = dict.fromkeys(product(*options))
    else:
        found = dict.fromkeys(_equal_parts(cluster, options))
        for first, second in combinations(range(kinds), 2):
            for a, b in product(_shares(cluster, options, first), _shares(cluster, options, second)):
                found[tuple(a if k == first else b if k == second else 0 for k in range(kinds))] = None
    alone = [
        tuple(part if k == kind else 0 for k in range(kinds))
        for kind in range(kinds)
        for part in _inside(cluster, kind)
    ]
    return [c for c in [*found, *(a for a in alone if a not in found)] if any(c)]


def _inside(cluster: ClusterSpec, kind: int) -> list[int]:
    """Parts of one node: a group that needs no NIC shares none."""
    return _parts(cluster.nodes[kind].devices)


def _shares(cluster: ClusterSpec, options: Sequence[list[int]], kind: int) -> list[int]:
    """The devices of one node group in 1, 2, 4... equal parts."""
    node = cluster.nodes[kind]
    total, result, parts = node.count * node.devices, [], 1
    while parts <= total:
        result.append(max(amount for amount in options[kind] if amount * parts <= total))
        parts *= 2
    return list(dict.fromkeys(result))


def _equal_parts(cluster: ClusterSpec, options: Sequence[list[int]]) -> Iterator[Composition]:
    kinds = len(cluster.nodes)
    for size in range(1, kinds + 1):
        for chosen in combinations(range(kinds), size):
            for parts in SHARES:
                yield tuple(
                    max(a for a in options[k] if a * parts <= cluster.nodes[k].count * cluster.nodes[k].devices)
                    if k in chosen
                    else 0
                    for k in range(kinds)
                )


def ranks_of(cluster: ClusterSpec, chosen: Sequence[tuple[Composition, int]]) -> list[list[list[int]]]:
    """Ranks of `number` groups of each composition: whole nodes first, then parts in falling order, so that none
    straddles nodes."""
    order = sorted(
        (-composition[kind], index, replica, kind)
        for index, (composition, number) in enumerate(chosen)
        for replica in range(number)
        for kind in range(len(cluster.nodes))
        if composition[kind]
    )
    firsts, taken = _firsts(cluster), [0] * len(cluster.nodes)
    result: list[list[list[int]]] = [[[] for _ in range(number)] for _, number in chosen]
    for amount, index, replica, kind in order:
        start = firsts[kind] + taken[kind]
        result[index][replica] += range(start, start - amount)
        taken[kind] -= amount
    return [[sorted(ranks) for ranks in replicas] for replicas in result]


def _firsts(cluster: ClusterSpec) -> list[int]:
    result, first = [], 0
    for node in cluster.nodes:
        result.append(first)
        first += node.count * node.devices
    return result
