"""Which of several equal ranks takes which bundle of experts, so that NICs with several ranks receive even shares."""

from collections.abc import Hashable, Sequence

import numpy as np

from hetermoe_cli.planner.arrays import FloatArray, IntArray


def spread(
    hosts: IntArray, rows: FloatArray, size: FloatArray, room: FloatArray, kinds: Sequence[Hashable], nics: IntArray
) -> IntArray:
    """Exchange all experts of ranks of equal kind, most rows first to the NIC that receives least so far.

    `hosts`, `rows` and `size` (bytes, the same for equal kinds) are [experts]; the rest is [ranks]. As it was where
    memory stands in the way.
    """
    world = len(room)
    received, held = np.zeros(world), np.zeros(world)
    np.add.at(received, hosts, rows)
    np.add.at(held, hosts, size)
    load, moved = np.zeros(int(nics.max()) + 1), np.full(world, -1)
    free = {kind: [rank for rank in range(world) if kinds[rank] == kind] for kind in set(kinds)}
    for rank in np.argsort(-received, kind="stable").tolist():
        fitting = [other for other in free[kinds[rank]] if held[rank] <= room[other]]
        if not fitting:
            return hosts
        least = min(fitting, key=lambda other: (load[nics[other]], other != rank))
        free[kinds[rank]].remove(least)
        load[nics[least]] += received[rank]
        moved[rank] = least
    result: IntArray = moved[hosts]
    return result
