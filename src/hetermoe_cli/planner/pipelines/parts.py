"""Pipelines on parts of a cluster: on equal ones side by side where it has many nodes; and where dollars count on some
of its devices, as those that are left out cost nothing.

For dollars, parts are whole nodes where there are many devices, and looked at from where the objective is likely to be
best: for the most tokens a dollar those of one kind first, from few devices on, as every stage more waits longer for
its turn; for the fastest within a limit from what costs most.
"""

import time
from collections.abc import Sequence
from functools import partial
from math import inf

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.compositions import Composition, compositions
from hetermoe_cli.planner.cluster.objective import HOUR, Wanted, dollars_per_hour, merit
from hetermoe_cli.planner.cluster.parts import Part, group_inputs
from hetermoe_cli.planner.pipeline_search.search import FEW_DEVICES, MOST_UNITS, overlapped_pipelines
from hetermoe_cli.planner.pipeline_search.setups import Tuned, spread
from hetermoe_cli.planner.pipelines.layouts import Setups
from hetermoe_cli.spec.cluster import ClusterSpec

PARTS = 3  # numbers of equal parts


def whole_setups(cost: CostModel, below: float, most_pipelines: int | None, seconds: float) -> Setups:
    """On the whole cluster, as overlapped_pipelines; of more nodes than it looks at, in equal parts side by side, with
    nodes left out that are one too many. Larger parts are looked at where no smaller ones hold the model. No more
    numbers of parts than one once `seconds` are gone. Estimates leave out what parts have to sum together."""
    kinds, end = list(_nodes_by_kind(cost).values()), time.monotonic() + seconds
    if sum(map(len, kinds)) <= MOST_UNITS:
        return overlapped_pipelines(cost, below, most_pipelines)
    found: list[tuple[float, Tuned]] = []
    for least, most in ((2, MOST_UNITS), (MOST_UNITS + 1, 2 * MOST_UNITS)):
        for number in _numbers_of_parts(cost, list(map(len, kinds)), range(least, most + 1), most_pipelines):
            if found and time.monotonic() > end:
                break
            ranks = [_part_of(kinds, part, number) for part in range(number)]
            part = CostModel(group_inputs(cost.inputs, ranks[0], cost.train.global_batch_sequences // number), number)
            setups = overlapped_pipelines(part, below, most_pipelines and most_pipelines // number, most)
            found += [(taken, spread(tuned, ranks)) for taken, tuned in setups]
            below = min([below, *(taken for taken, _ in found)])
        if found:
            break
    return sorted(found, key=lambda pair: pair[0])


def _part_of(kinds: Sequence[Sequence[list[int]]], part: int, number: int) -> list[int]:
    """Ranks of one of so many equal parts: as many nodes of each kind."""
    shares = [nodes[part * (len(nodes) // number) :][: len(nodes) // number] for nodes in kinds]
    return sorted(rank for nodes in shares for node in nodes for rank in node)


def _nodes_by_kind(cost: CostModel) -> dict[object, list[list[int]]]:
    """The ranks of every node, nodes with the same devices and links together."""
    found: dict[object, list[list[int]]] = {}
    for ranks in cost.inputs.nodes:
        own = [cost.devices[rank] for rank in ranks]
        nics = [device.nic - own[0].nic for device in own]
        kind = tuple([(device.type, device.network, device.interconnect) for device in own]), tuple(nics)
        found.setdefault(kind, []).append(ranks)
    return found


def _numbers_of_parts(cost: CostModel, counts: Sequence[int], sizes: range, most_pipelines: int | None) -> list[int]:
    """How many equal parts of so many nodes of each kind, if each has one of `sizes`: those that leave out the fewest
    nodes, the largest parts first."""
    nodes, batch = sum(counts), cost.train.global_batch_sequences
    found = {number: sum(count // number for count in counts) for number in range(2, (most_pipelines or nodes) + 1)}
    fitting = [number for number, size in found.items() if size in sizes and batch % number == 0]
    return sorted(fitting, key=lambda number: (nodes - number * found[number], number))[:PARTS]


def promising_parts(cost: CostModel, wanted: Wanted, below: float, near: float, seconds: float) -> list[Setups]:
    """Setups on parts of the cluster, on each by itself, that are estimated to be less than `below` by the objective,
    the best part first; what is `near` times as much as the best so far may still be better. Parts are looked at until
    `seconds` are gone; where there is nothing to beat (infinite `below`), until one has setups as well."""
    alone = below == inf
    end, cluster, batch = time.monotonic() + seconds, cost.inputs.cluster, cost.train.global_batch_sequences
    found: list[tuple[float, Setups]] = []
    for dollars, part in _in_order(cost, wanted):
        most_seconds = below / dollars * HOUR if wanted.objective == "cost" else below
        if setups := whole_setups(part.cost(batch).balanced, near * most_seconds, wanted.most_groups, 0.0):
            estimate = merit(cluster, wanted, part.ranks, setups[0][0])
            below = min(below, estimate)
            found.append((estimate, [(taken, spread(tuned, [part.ranks])) for taken, tuned in setups]))
        if (found or not alone) and time.monotonic() > end:
            break
    return [setups for _, setups in sorted(found, key=lambda pair: pair[0])]


def _in_order(cost: CostModel, wanted: Wanted) -> list[tuple[float, Part]]:
    """Parts that may be used, with what an hour costs (where dollars do not count, the devices)."""
    cluster = cost.inputs.cluster
    wide = [c for c in compositions(cluster) if sum(c) > 1 and _whole(cluster, c)]
    parts = [Part(cost.inputs, c, 1) for c in wide if _holds(cost, c)]
    hourly = partial(dollars_per_hour, cluster) if wanted.needs_prices else len
    priced = [(float(hourly(part.ranks)), part) for part in parts]
    allowed = [pair for pair in priced if merit(cluster, wanted, pair[1].ranks, 0.0) == 0]
    if wanted.objective == "time":
        return sorted(allowed, key=lambda pair: -pair[0])
    return sorted(allowed, key=lambda pair: (len(pair[1].kinds), pair[0]))


def _whole(cluster: ClusterSpec, composition: Composition) -> bool:
    """Whether these are whole nodes, or few devices: nothing else is looked at (overlapped_pipelines)."""
    pairs = zip(composition, cluster.nodes, strict=True)
    return sum(composition) <= FEW_DEVICES or all(count % node.devices == 0 for count, node in pairs)


def _holds(cost: CostModel, composition: Composition) -> bool:
    """Whether memory holds the states of all parameters once."""
    pairs = zip(composition, cost.inputs.cluster.nodes, strict=True)
    room = sum(count * cost.types[node.device].memory_bytes for count, node in pairs)
    return room * cost.train.memory_headroom >= sum(STATE_BYTES[cost.train.precision]) * cost.model.parameters
