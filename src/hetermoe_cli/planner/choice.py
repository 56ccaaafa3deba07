"""Choice: what is fixed outside the MILP; and the classes of devices that it treats alike."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hetermoe_cli.spec.cluster import Device
from hetermoe_cli.spec.layout import LayerPlacement, Layout, ScheduleChoice


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


def group(devices: Sequence[Device], sequences: Sequence[int], *, per_device: bool = False) -> list[DeviceClass]:
    """Classes of devices that any symmetry of the cluster maps onto each other, in rank order."""
    members: dict[object, list[int]] = defaultdict(list)
    keys = symmetry_keys(devices, sequences)
    for device in devices:
        members[device.rank if per_device else keys[device.rank]].append(device.rank)
    return [DeviceClass(devices[ranks[0]].type, sequences[ranks[0]], tuple(ranks)) for ranks in members.values()]


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
