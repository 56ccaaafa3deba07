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


class TransferCost(NamedTuple):
    """Seconds, and the indices of the ports that are busy for as long."""

    seconds: float
    ports: tuple[int, ...]


class Network:
    """All ports of a cluster: out and in of every NIC, then out and in of every device's interconnect.

    `out_port[s, d]` and `in_port[s, d]` are the ports of a message from rank s to rank d (-1 on the diagonal).
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        nics = 1 + max(device.nic for device in devices)
        world = len(devices)
        nic = np.array([device.nic for device in devices])
        node = np.array([device.node for device in devices])
        rank = np.arange(world)
        same_node = node[:, None] == node[None, :]
        self.out_port = np.where(same_node, 2 * (nics + rank)[:, None], 2 * nic[:, None])
        self.in_port = np.where(same_node, 2 * (nics + rank)[None, :] + 1, 2 * nic[None, :] + 1)
        np.fill_diagonal(self.out_port, -1)
        np.fill_diagonal(self.in_port, -1)
        self.count = 2 * (nics + world)
        self._byte_seconds = np.zeros(self.count)
        self._latency = np.zeros(self.count)
        for device in devices:
            for base, link in ((2 * device.nic, device.network), (2 * (nics + device.rank), device.interconnect)):
                self._byte_seconds[base : base + 2] = 1 / (link.bandwidth_gigabytes_per_second * 1e9)
                self._latency[base : base + 2] = link.latency_microseconds * 1e-6
        self._mask = self.out_port >= 0

    def link(self, port: int) -> tuple[float, float]:
        """(seconds a byte, seconds of latency) of a port."""
        return float(self._byte_seconds[port]), float(self._latency[port])

    def seconds(self, sent: Matrix) -> float:
        """Seconds to move `sent[source, target]` bytes; the diagonal stays on its device and is free."""
        mask = self._mask & (sent > 0)
        amounts = sent[mask]
        load = np.bincount(self.out_port[mask], amounts, self.count)
        load += np.bincount(self.in_port[mask], amounts, self.count)
        used = np.flatnonzero(load)
        if not len(used):
            return 0.0
        return float((load[used] * self._byte_seconds[used] + self._latency[used]).max())

    def ports(self, pairs: NDArray[np.bool_]) -> tuple[int, ...]:
        """Ports of messages between the (source, target) pairs that are set."""
        mask = self._mask & pairs
        return tuple(np.union1d(self.out_port[mask], self.in_port[mask]).tolist())

    def all_reduce_seconds(self, ranks: Sequence[int], size: float) -> float:
        """Ring all-reduce of `size` bytes: 2 (m - 1) / m of them over the slowest link, 2 (m - 1) latencies.

        Ranks follow each other through the nodes, so that one message at a time crosses each NIC direction.
        """
        m = len(ranks)
        if m < 2 or not size:
            return 0.0
        ring = list(zip(ranks, [*ranks[1:], ranks[0]], strict=True))
        ports = np.array([port for s, d in ring for port in (self.out_port[s, d], self.in_port[s, d])])
        rounds = 2 * (m - 1)
        return float(rounds / m * size * self._byte_seconds[ports].max() + rounds * self._latency[ports].max())
