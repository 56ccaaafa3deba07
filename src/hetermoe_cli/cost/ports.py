"""Ports: the NIC and interconnect directions that transfers occupy, and how long they do.

A transfer is one fluid movement of all its messages: it lasts max over ports of (bytes / bandwidth + latency).
Messages inside a node use the devices' interconnect, others the NICs; a port carries one transfer at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.spec.cluster import Device

Matrix = NDArray[np.float64]
Ranks = NDArray[np.intp]


class TransferCost(NamedTuple):
    """Seconds, and the indices of the ports that are busy for as long."""

    seconds: float
    ports: tuple[int, ...]


class Network:
    """All ports of a cluster: out and in of every NIC, then out and in of every device's interconnect.

    `out_port[s, d]` and `in_port[s, d]` are the ports of a message from rank s to rank d (-1 on the diagonal).
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self._nics = nics = 1 + max(device.nic for device in devices)
        self._nic = nic = np.array([device.nic for device in devices])
        self._node = node = np.array([device.node for device in devices])
        self._rank = rank = np.arange(len(devices))
        same_node = node[:, None] == node[None, :]
        self.out_port = np.where(same_node, 2 * (nics + rank)[:, None], 2 * nic[:, None])
        self.in_port = np.where(same_node, 2 * (nics + rank)[None, :] + 1, 2 * nic[None, :] + 1)
        np.fill_diagonal(self.out_port, -1)
        np.fill_diagonal(self.in_port, -1)
        self.count = 2 * (nics + len(devices))
        self._byte_seconds, self._ring_byte_seconds = np.zeros(self.count), np.zeros(self.count)
        self._latency = np.zeros(self.count)
        for device in devices:
            for base, link in ((2 * device.nic, device.network), (2 * (nics + device.rank), device.interconnect)):
                self._byte_seconds[base : base + 2] = 1 / (link.bandwidth_gigabytes_per_second * 1e9)
                self._ring_byte_seconds[base : base + 2] = 1 / link.ring_bandwidth
                self._latency[base : base + 2] = link.latency_microseconds * 1e-6

    def link(self, port: int) -> tuple[float, float]:
        """(seconds a byte, seconds of latency) of a port."""
        return float(self._byte_seconds[port]), float(self._latency[port])

    def ring_link(self, port: int) -> tuple[float, float]:
        """The same of an all-reduce's messages."""
        return float(self._ring_byte_seconds[port]), float(self._latency[port])

    def owner(self, port: int) -> tuple[int, bool]:
        """(NIC, False) of a NIC's port, (rank, True) of an interconnect's."""
        nics = self.count // 2 - len(self.out_port)
        return (port // 2, False) if port // 2 < nics else (port // 2 - nics, True)

    def port(self, number: int, inside: bool, way: int) -> int:
        """Inverse of `owner`; way 0: out, 1: in."""
        nics = self.count // 2 - len(self.out_port)
        return 2 * (nics + number if inside else number) + way

    def seconds(self, sent: Matrix, targets: Ranks) -> float:
        """Seconds to move `sent[source, message]` bytes to rank `targets[message]`; the way back lasts as long."""
        return float(self.busy(sent, targets).max())

    def busy(self, sent: Matrix, targets: Ranks) -> Matrix:
        """[ports] seconds that each is busy with it, zero where nothing passes; what stays on its device is free.

        On the way back the same rows pass the other direction of every NIC and interconnect: port ^ 1.
        """
        away = self._node[:, None] != self._node[targets]
        outside = np.where(away, sent, 0.0)
        inside = np.where(away | (self._rank[:, None] == targets), 0.0, sent)
        nics, load = self._nics, np.empty(self.count)
        load[0 : 2 * nics : 2] = np.bincount(self._nic, outside.sum(axis=1), nics)
        load[1 : 2 * nics : 2] = np.bincount(self._nic[targets], outside.sum(axis=0), nics)
        load[2 * nics :: 2] = inside.sum(axis=1)
        load[2 * nics + 1 :: 2] = np.bincount(targets, inside.sum(axis=0), len(self._rank))
        return np.where(load > 0, load * self._byte_seconds + self._latency, 0.0)

    def ports(self, sources: Ranks, targets: Ranks) -> tuple[int, ...]:
        """Ports of messages from all `sources` to all `targets`."""
        outgoing, incoming = self._sides(sources, targets), self._sides(targets, sources)
        return tuple(sorted({2 * side for side in outgoing} | {2 * side + 1 for side in incoming}))

    def _sides(self, ranks: Ranks, others: Ranks) -> set[int]:
        """Half the port numbers through which `ranks` reach some of `others`: NICs, then interconnects."""
        reached = np.bincount(self._node[others], minlength=1 + self._node.max())[self._node[ranks]]
        itself = np.zeros(len(self._rank), dtype=np.intp)
        itself[others] = 1
        nics = self._nic[ranks[reached < len(others)]]
        return {*nics.tolist(), *(self._nics + ranks[reached > itself[ranks]]).tolist()}

    def ring_ports(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Ports of a ring through `ranks` in their order."""
        ring = list(zip(ranks, [*ranks[1:], ranks[0]], strict=True)) if len(ranks) > 1 else []
        return tuple(sorted({int(p) for s, d in ring for p in (self.out_port[s, d], self.in_port[s, d])}))

    def all_reduce_seconds(self, ranks: Sequence[int], size: float) -> float:
        """Ring all-reduce of `size` bytes: 2 (m - 1) / m of them over the slowest link, 2 (m - 1) latencies.

        Ranks follow each other through the nodes, so that one message at a time crosses each NIC direction.
        """
        m = len(ranks)
        if m < 2 or not size:
            return 0.0
        ports = np.array(self.ring_ports(ranks))
        rounds = 2 * (m - 1)
        return float(rounds / m * size * self._ring_byte_seconds[ports].max() + rounds * self._latency[ports].max())
