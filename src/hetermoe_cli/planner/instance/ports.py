"""Ports on class level: what a transfer loads a NIC or interconnect direction with, exactly or on average."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hetermoe_cli.planner.arrays import BoolArray, FloatArray


@dataclass(frozen=True)
class Port:
    """Load of one NIC or interconnect direction by a transfer towards the experts of one layer.

    Bytes are source_bytes * (experts - replicated) + sum of bytes_per_expert[c] * (hosted experts of class c); the
    port is used where a class of `users` hosts. A transfer from the experts is the transposed matrix on the same
    full-duplex links: it lasts as long. Where rows go once per device that is what they are at most (`counts.py`).
    """

    source_bytes: float
    bytes_per_expert: tuple[float, ...]
    users: tuple[int, ...]
    byte_seconds: float
    latency: float
    devices: int  # hosting devices behind the port; 0 for a source's port
    number: int = field(default=-1, compare=False)  # of one such port in the network


def on_average(ports: Sequence[Port], sizes: Sequence[int]) -> list[Port]:
    """What ports that the cluster's symmetries swap are sure to carry where classes of `sizes` devices host their mean.

    A class's mean says nothing of those of its devices that are behind one port, unless equal ports have them all.
    Where some were taken apart they do not: of such ports only the mean is sure.
    """
    copies, shared = Counter(ports), np.array(sizes) > 1
    total = np.sum([port.bytes_per_expert for port in ports], axis=0)
    sure = [port for port in copies if port.devices == 1 or _has_all(port, copies[port], total, shared)]
    others = [port for port in ports if port not in sure]
    return [*sure, _mean(others)] if others else sure


def _has_all(port: Port, copies: int, total: FloatArray, shared: BoolArray) -> bool:
    """Whether all rows of the `shared` classes that the port carries any of go through its copies."""
    own = np.array(port.bytes_per_expert)
    return bool((np.isclose(copies * own, total) | (own == 0))[shared].all())


def _mean(ports: Sequence[Port]) -> Port:
    """A port with the load of several on average."""
    each = np.mean([port.bytes_per_expert for port in ports], axis=0)
    users = sorted({c for port in ports for c in port.users})
    return replace(ports[0], bytes_per_expert=tuple(each.tolist()), users=tuple(users))
