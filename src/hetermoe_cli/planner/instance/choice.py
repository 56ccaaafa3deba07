"""Choice: what is fixed outside the MILP; and the classes of devices that it treats alike."""

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hetermoe_cli.spec.cluster import Device
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.schedule_choice import ScheduleChoice

ALL = sys.maxsize  # devices apart


@dataclass(frozen=True)
class Choice:
    """Schedule, R, recompute and the sequences that each rank attends to per micro-batch."""

    schedule: ScheduleChoice
    sequences: tuple[int, ...]

    @property
    def micro_batch_sequences(self) -> int:
        """Sequences of one micro-batch over all ranks."""
        return sum(self.sequences)

    def layout(self, placement: list[LayerPlacement]) -> Layout:
        """The layout that runs `placement` under this choice."""
        return Layout(schedule=self.schedule, sequences_per_rank=list(self.sequences), placement=placement)

    def full_layout(self, layers: int) -> Layout:
        """Every rank hosts one made-up expert of every layer: its schedule holds every task that may be needed."""
        everywhere = LayerPlacement(experts=[[rank] for rank in range(len(self.sequences))])
        return self.layout([everywhere] * layers)


@dataclass(frozen=True)
class DeviceClass:
    """Devices that share one set of variables: equal type, sequences and place in the network."""

    type: str
    sequences: int
    ranks: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of devices."""
        return len(self.ranks)

    @property
    def attends(self) -> bool:
        """Whether its devices attend to sequences."""
        return self.sequences > 0


def group(devices: Sequence[Device], sequences: Sequence[int], apart: int = 0) -> list[DeviceClass]:
    """Classes of devices that some symmetry of the cluster maps onto each other, in rank order.

    The first `apart` devices of each are classes of their own; of those that attend only where all do, or ALL are.
    """
    members: dict[object, list[int]] = defaultdict(list)
    for device, key in zip(devices, symmetry_keys(devices, sequences), strict=True):
        members[key].append(device.rank)
    attending_too = apart == ALL or all(sequences)
    parts: list[list[int]] = []
    for ranks in members.values():
        single = min(apart, len(ranks)) if attending_too or not sequences[ranks[0]] else 0
        parts += [[rank] for rank in ranks[:single]]
        parts += [ranks[single:]] if ranks[single:] else []
    return [DeviceClass(devices[ranks[0]].type, sequences[ranks[0]], tuple(ranks)) for ranks in sorted(parts)]


def symmetry_keys(devices: Sequence[Device], sequences: Sequence[int]) -> list[object]:
    """Per rank a key; equal keys mean that some renumbering of equal nodes, NICs and devices swaps the two ranks."""

    def label(device: Device) -> tuple[object, ...]:
        links = (device.network, device.interconnect)
        numbers = [
            (link.bandwidth_gigabytes_per_second, link.ring_bandwidth, link.latency_microseconds) for link in links
        ]
        return (device.type, *numbers, sequences[device.rank])

    on_nic: dict[int, list[tuple[object, ...]]] = defaultdict(list)
    nics_of: dict[int, set[int]] = defaultdict(set)
    for device in devices:
        on_nic[device.nic].append(label(device))
        nics_of[device.node].add(device.nic)
    nic_keys = {nic: tuple(sorted(labels, key=repr)) for nic, labels in on_nic.items()}
    node_keys = {node: tuple(sorted((nic_keys[nic] for nic in nics), key=repr)) for node, nics in nics_of.items()}
    return [(label(device), nic_keys[device.nic], node_keys[device.node]) for device in devices]


class Symmetries:
    """Which devices can be said to host at least as much as others, as some renumbering of the cluster makes it so."""

    def __init__(self, devices: Sequence[Device], sequences: Sequence[int]) -> None:
        self._devices, self.keys = devices, symmetry_keys(devices, sequences)
        self._first: dict[object, int] = {}
        self._mixed: set[object] = set()  # keys of devices in nodes with others
        self._beside = Counter(device.node for device in devices)
        keys_of: dict[int, set[object]] = defaultdict(set)
        for device, key in zip(devices, self.keys, strict=True):
            self._first.setdefault(key, device.rank)
            keys_of[device.node].add(key)
        for keys in keys_of.values():
            if len(keys) > 1:
                self._mixed |= keys

    def leads(self, first: int, other: int) -> bool:
        """Whether `first` may be taken to host at least as much as the later `other`, all such pairs at once.

        Devices of one NIC can be exchanged freely. So can nodes of a single device; larger ones only as a whole: where
        they hold nothing else, the one with the fullest device of all comes first.
        """
        key, devices = self.keys[first], self._devices
        if key != self.keys[other] or first >= other:
            return False
        if devices[first].nic == devices[other].nic or self._beside[devices[first].node] == 1:
            return True
        return key not in self._mixed and first == self._first[key]
