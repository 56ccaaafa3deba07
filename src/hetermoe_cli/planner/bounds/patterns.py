"""Patterns: every way to share out one layer's experts over the classes, and what each costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from hetermoe_cli.planner.arrays import BoolArray, FloatArray, IntArray
from hetermoe_cli.planner.instance.ports import Port
from hetermoe_cli.planner.instance.rates import Rates

MOST_PATTERNS = 40_000


@dataclass(frozen=True)
class Patterns:
    """`totals` [classes, patterns]: hosted experts of a class together; `replicated` [patterns].

    The quantities below hold for every device-level placement with these totals: lengths are at least so long.
    """

    rates: Rates
    totals: IntArray
    replicated: IntArray
    caps: tuple[int, ...]  # experts of a layer that one device of a class can take at most
    idle: int | None = None  # a class of which one device hosts nothing

    def subset(self, index: Sequence[int] | IntArray) -> "Patterns":
        """Some of the patterns."""
        return Patterns(self.rates, self.totals[:, index], self.replicated[index], self.caps)

    @cached_property
    def sizes(self) -> IntArray:
        """[classes, 1] devices."""
        return np.array([[c.count] for c in self.rates.classes])

    @cached_property
    def attends(self) -> BoolArray:
        """[classes, 1]."""
        return np.array([[c.attends] for c in self.rates.classes])

    @cached_property
    def fullest(self) -> FloatArray:
        """[classes, patterns] hosted experts of the fullest device."""
        hosting = self.sizes.copy()
        if self.idle is not None:
            hosting[self.idle] -= 1
        return np.ceil(self.totals / hosting - 1e-9)

    @cached_property
    def mean(self) -> FloatArray:
        """[classes, patterns] hosted experts of a device on average."""
        result: FloatArray = self.totals / self.sizes
        return result

    @cached_property
    def hosts(self) -> BoolArray:
        """[classes, patterns] whether some device of the class hosts."""
        return self.totals > 0

    @cached_property
    def transfer(self) -> FloatArray:
        """[patterns] seconds of a dispatch or combine."""
        result = np.zeros(len(self.replicated))
        for port in self.rates.mean_ports:
            used = self.hosts[list(port.users)].any(0)
            result = np.maximum(result, used * (self._bytes(port) * port.byte_seconds + port.latency))
        return result

    def _bytes(self, port: Port) -> FloatArray:
        weights = np.array(port.bytes_per_expert)
        received = self.fullest if port.devices == 1 else self.mean
        load: FloatArray = np.maximum(weights, 0) @ received + np.minimum(weights, 0) @ self.mean
        return np.maximum(load + port.source_bytes * (self.rates.experts - self.replicated), 0.0)

    @cached_property
    def contended(self) -> BoolArray:
        """[patterns] whether dispatches and combines are sure to share links, within the layer and with the one before.

        That is where a device hosts behind a NIC that an attending device sends through, others attend in another
        node, and others host in another node. Claimed only where each node has one NIC.
        """
        result = np.zeros(len(self.replicated), dtype=bool)
        for c in self._meeting:
            result |= self.hosts[c] & self._elsewhere(c)
        return result

    @cached_property
    def held(self) -> BoolArray:
        """[patterns] whether the layer's first message is sure to share a link with the last ones of a layer before
        that is `contended`: some host is in another node than those hosts."""
        result = np.full(len(self.replicated), bool(self._meeting))
        for c in self._meeting:
            result &= self._elsewhere(c)
        return result & self.hosts.any(0)

    @cached_property
    def _meeting(self) -> list[int]:
        """Classes in whose nodes others attend, while some attend elsewhere; none where a node has several NICs."""
        devices = self.rates.cost.devices
        if len({(device.node, device.nic) for device in devices}) > len({device.node for device in devices}):
            return []
        return [c for c in range(len(self.sizes)) if self._meets(c)]

    def _meets(self, c: int) -> bool:
        """Whether attending devices share the nodes of class c, and others attend in other nodes."""
        devices, sequences = self.rates.cost.devices, self.rates.choice.sequences
        attending = {device.node for device in devices if sequences[device.rank]}
        node = devices[self.rates.classes[c].ranks[0]].node
        return node in attending and len(attending) > 1

    def _elsewhere(self, c: int) -> BoolArray:
        """[patterns] whether a device in another node than that of any host of class c is sure to host."""
        devices, classes = self.rates.cost.devices, self.rates.classes
        nodes = [{devices[rank].node for rank in device_class.ranks} for device_class in classes]
        first = devices[classes[c].ranks[0]].node
        inside = sum(
            cap * sum(devices[rank].node == first for rank in d.ranks)
            for cap, d in zip(self.caps, classes, strict=True)
        )
        result: BoolArray = self.rates.experts - self.replicated > inside
        for d, others in enumerate(nodes):
            if not others & nodes[c]:
                result = result | self.hosts[d]
        return result


def all_patterns(rates: Rates, caps: Sequence[int], most_copies: int, *, even: bool = False) -> Patterns | None:
    """Every pattern (of the even ones) within the caps; None where there are too many to look at."""
    tables = np.zeros((0, 1), dtype=np.int64)
    for c, cap in zip(rates.classes, caps, strict=True):
        amounts = np.arange(0, min(rates.experts, cap * c.count) + 1, c.count if even else 1)
        if tables.shape[1] * len(amounts) > 20 * MOST_PATTERNS:
            return None
        tables = np.vstack([np.repeat(tables, len(amounts), axis=1), np.tile(amounts, tables.shape[1])[None]])
        tables = tables[:, tables.sum(0) <= rates.experts]
    copies = rates.experts - tables.sum(0)
    kept = copies <= most_copies
    if kept.sum() > MOST_PATTERNS:
        return None
    return Patterns(rates, tables[:, kept], copies[kept], tuple(caps))


def caps_within(rates: Rates, horizon: float) -> tuple[list[int], int]:
    """Per class the most experts of a layer on one device, and the most copies, that fit memory and `horizon`."""
    count, copies, caps = rates.choice.schedule.micro_batches, rates.experts, []
    for c, r in zip(rates.classes, rates.of, strict=True):
        room = r.memory_limit - r.memory_base - r.memory_if_any
        busy = count * r.attending(rates.layers) if c.attends else 0.0
        left = max(0.0, horizon - busy) * (1 + 1e-9)
        held = int(max(0.0, room) / (r.memory_per_hosted + r.memory_per_share))
        caps.append(min(rates.experts, held, int(left / (count * sum(r.hosted)))))
        if c.attends:
            copies = min(copies, int(left / (count * sum(r.replicated))))
    return caps, copies


@dataclass(frozen=True)
class Limits:
    """What every layer of a placement within the horizon has at least and at most: experts per class, then copies.

    `partial`: most experts of a class of which some device hosts none.
    """

    least: tuple[int, ...]
    most: tuple[int, ...]
    partial: tuple[int, ...]

    @classmethod
    def of(cls, rates: Rates, horizon: float) -> "Limits":
        """From memory and compute of single devices."""
        caps, copies = caps_within(rates, horizon)
        most = [min(rates.experts, cap * c.count) for cap, c in zip(caps, rates.classes, strict=True)]
        partial = [min(rates.experts, cap * (c.count - 1)) for cap, c in zip(caps, rates.classes, strict=True)]
        return cls((0,) * (len(caps) + 1), (*most, copies), tuple(partial))

    def alike(self, rates: Rates) -> "Limits":
        """The same where devices of a class differ by at most one expert: an idle one means that none has two."""
        partial = [min(most, c.count - 1) for most, c in zip(self.partial, rates.classes, strict=True)]
        return replace(self, partial=tuple(partial))
