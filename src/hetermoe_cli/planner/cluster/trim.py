"""Trim: take devices that a layout gives nothing to do out of its group, so that they are neither held nor paid for."""

from collections import Counter
from collections.abc import Sequence

from hetermoe_cli.spec.cluster import Device
from hetermoe_cli.spec.layout import LayerPlacement, Layout


def trimmed(
    layout: Layout, replicas: Sequence[Sequence[int]], devices: Sequence[Device]
) -> tuple[Layout, list[list[int]]]:
    """The layout without idle ranks, and the replicas (ranks of the cluster with these `devices`) without them.

    Single devices go where none of their type in their node shares a NIC with another; else all of a group's devices in
    the node go, or none, as a NIC must not be left to two groups.
    """
    kept = _kept(layout, replicas[0], devices)
    if len(kept) == layout.world_size:
        return layout, [list(ranks) for ranks in replicas]
    placement = [
        LayerPlacement(experts=[p.experts[local] for local in kept], replicated=p.replicated) for p in layout.placement
    ]
    result = Layout(
        schedule=layout.schedule,
        sequences_per_rank=[layout.sequences_per_rank[local] for local in kept],
        placement=placement,
        shifts=[layout.shifts[local] for local in kept] if layout.shifts else [],
        head=[layout.head[local] for local in kept] if layout.head else [],
    )
    return result, [[ranks[local] for local in kept] for ranks in replicas]


def _kept(layout: Layout, ranks: Sequence[int], devices: Sequence[Device]) -> list[int]:
    """Local ranks that stay."""
    busy = [
        layout.has_dense(local) or any(p.experts[local] for p in layout.placement) for local in range(layout.world_size)
    ]
    on_nic = Counter(device.nic for device in devices)
    sharing = {(device.node, device.type) for device in devices if on_nic[device.nic] > 1}
    needed = {devices[rank].node for local, rank in enumerate(ranks) if busy[local]}
    return [
        local
        for local, rank in enumerate(ranks)
        if busy[local] or (devices[rank].node in needed and (devices[rank].node, devices[rank].type) in sharing)
    ]
