"""Rates: every coefficient of one choice, class by class, read from the cost model that simulator and engine use."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property

import numpy as np

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.instance.choice import Choice, DeviceClass, Symmetries, group
from hetermoe_cli.planner.instance.device_rates import device_rates
from hetermoe_cli.planner.instance.ports import Port, on_average
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.schedule import is_whole


class Rates:
    """All coefficients of `choice` over `classes`."""

    def __init__(self, cost: CostModel, choice: Choice, classes: Sequence[DeviceClass]) -> None:
        self.cost, self.choice, self.classes = cost, choice, tuple(classes)
        self.layers, self.experts = cost.model.layers, cost.model.experts
        self.class_of = {rank: index for index, c in enumerate(self.classes) for rank in c.ranks}
        total = choice.micro_batch_sequences
        attending = sum(c.count for c in self.classes if c.attends)
        self.of = [device_rates(cost, c.ranks[0], c.sequences, choice.schedule, total, attending) for c in self.classes]

    @cached_property
    def sizes(self) -> list[int]:
        """Devices of every class."""
        return [c.count for c in self.classes]

    @property
    def _attending(self) -> list[int]:
        return sorted(rank for c in self.classes if c.attends for rank in c.ranks)

    @cached_property
    def reduces(self) -> list[tuple[float, float]]:
        """Seconds of the all-reduce of every layer's gradients and of the head's: without replicated experts, and for
        each one."""
        result = []
        for layer in range(self.layers + 1):
            base, more = (
                self.cost.reduce_seconds(self.choice.schedule, self._attending, layer, copies) for copies in (0, 1)
            )
            result.append((base, more - base if layer < self.layers else 0.0))
        return result

    @cached_property
    def gathers(self) -> list[tuple[float, float]]:
        """Seconds of the all-gather of every layer's weights and of the head's, as `reduces`; none where states are
        not shared out."""
        if not self.choice.schedule.shares_states or len(self._attending) < 2:
            return [(0.0, 0.0)] * (self.layers + 1)
        result = []
        for layer in range(self.layers + 1):
            base, more = (self.cost.gather_seconds(self._attending, layer, copies) for copies in (0, 1))
            result.append((base, more - base if layer < self.layers else 0.0))
        return result

    def collective(self, action: Action) -> tuple[float, float]:
        """Seconds of a collective: without replicated experts, and for each one of the layer."""
        base, each = (self.gathers if action.kind is Kind.GATHER else self.reduces)[action.layer]
        return base, each if is_whole(action, self.choice.schedule.micro_batches) else 0.0

    @property
    def around_compute(self) -> float:
        """Seconds before the first compute task and from the last one to the optimizer step, at least: layer 0's
        weights and gradients."""
        return self.gathers[0][0] + self.reduces[0][0]

    @cached_property
    def ring(self) -> dict[int, bool]:
        """Classes whose transfers can use a port of the all-reduce; whether those of any of their devices do."""
        attending, network = np.array(self._attending), self.cost.network
        ports = np.array(network.ring_ports(self._attending), dtype=np.intp)
        result = {}
        for number, device_class in enumerate(self.classes):
            ranks = np.array(device_class.ranks)
            there, back = np.ix_(attending, ranks), np.ix_(ranks, attending)
            towards = np.isin([network.out_port[there], network.in_port[there]], ports).any((0, 1))
            away = np.isin([network.out_port[back], network.in_port[back]], ports).any((0, 2))
            if (towards | away).any():
                result[number] = bool((towards & away).all())
        return result

    def scaled(self, unit: float) -> "Rates":
        """The same with all times in units of `unit` seconds."""
        result = copy(self)
        result.of = [r.scaled(unit) for r in self.of]
        result.ports, result.least_ports, result.mean_ports = (
            [replace(port, byte_seconds=port.byte_seconds / unit, latency=port.latency / unit) for port in ports]
            for ports in (self.ports, self.least_ports, self.mean_ports)
        )
        result.reduces = [(base / unit, each / unit) for base, each in self.reduces]
        result.gathers = [(base / unit, each / unit) for base, each in self.gathers]
        return result

    @cached_property
    def serial(self) -> float:
        """More seconds than any placement takes: every task and transfer after one another, as large as can be."""
        everything = self.layers * self.experts
        windows = self.choice.schedule.micro_batches // self.choice.schedule.window
        total = sum(windows * base + each * self.experts for base, each in self.reduces)
        total += sum(2 * windows * base + each * self.experts for base, each in self.gathers)
        for r in self.of:
            tasks = r.attending(self.layers) + everything * (sum(r.hosted) + sum(r.replicated))
            total += self.choice.schedule.micro_batches * tasks
            total += r.optimizer_base + everything * (r.optimizer_per_expert + r.optimizer_per_copy)
        rows = self.experts * self.cost.rows_per_expert(self.choice.micro_batch_sequences) * self.cost.row_bytes
        longest = max((2 * rows * port.byte_seconds + port.latency for port in self.ports), default=0.0)
        return total + 5 * self.choice.schedule.micro_batches * self.layers * longest

    @cached_property
    def ports(self) -> list[Port]:
        """Distinct ports that a transfer towards the experts can use."""
        return list(dict.fromkeys(port for pair in self._port_pairs for port in pair if port is not None))

    @cached_property
    def least_ports(self) -> list[Port]:
        """The same with what they carry at least, whatever is chosen together."""
        return self._at_least(self.ports)

    def _at_least(self, ports: Iterable[Port]) -> list[Port]:
        share = self.cost.least_row_bytes / self.cost.row_bytes
        return [replace(port, byte_seconds=port.byte_seconds * share) for port in ports]

    @cached_property
    def mean_ports(self) -> list[Port]:
        """These with loads that hold on average over the devices of a class, whichever of them host more."""
        if self.classes == tuple(group(self.cost.devices, self.choice.sequences)):
            return self.least_ports  # equal devices are behind equal ports
        alike: dict[object, list[Port]] = defaultdict(list)
        for port in self._at_least(port for pair in self._port_pairs for port in pair if port is not None):
            alike[self._symmetry(port.number)].append(port)
        return list(dict.fromkeys(port for ports in alike.values() for port in on_average(ports, self.sizes)))

    def _symmetry(self, port: int) -> object:
        """Equal for ports that some renumbering of the cluster swaps."""
        number, inside = self.cost.network.owner(port)
        ranks = [number] if inside else [device.rank for device in self.cost.devices if device.nic == number]
        return port % 2, inside, frozenset(self._symmetries.keys[rank] for rank in ranks)

    @cached_property
    def conflicts(self) -> list[tuple[int, int]]:
        """Class pairs (c, d): a transfer from hosts of c and one towards hosts of d share a link direction."""
        pairs: dict[tuple[int, int], None] = {}
        for source, target in self._port_pairs:
            if source and target:
                pairs |= {(c, d): None for c in target.users for d in source.users}
        return list(pairs)

    def sure_conflict(self, c: int, d: int) -> bool:
        """Whether any host of one class and any of the other conflict: the nodes of one attend, the other is elsewhere.

        Claimed only where each node has one NIC and others attend in other nodes.
        """
        devices, sequences = self.cost.devices, self.choice.sequences
        if len({(device.node, device.nic) for device in devices}) > len({device.node for device in devices}):
            return False
        first, second = ({devices[rank].node for rank in self.classes[i].ranks} for i in (c, d))
        attending = {device.node for device in devices if sequences[device.rank]}
        return not first & second and len(attending) > 1 and (first <= attending or second <= attending)

    @cached_property
    def _port_pairs(self) -> list[tuple[Port | None, Port | None]]:
        """Out and in direction of every link, in the transfers towards the experts."""
        network, sequences = self.cost.network, self.choice.sequences
        world = range(len(sequences))
        outgoing: dict[int, list[tuple[int, int]]] = {}
        incoming: dict[int, list[tuple[int, int]]] = {}
        for source in world:
            for target in world:
                if sequences[source] and source != target:
                    outgoing.setdefault(int(network.out_port[source, target]), []).append((source, target))
                    incoming.setdefault(int(network.in_port[source, target]), []).append((source, target))
        links = sorted({port // 2 for port in [*outgoing, *incoming]})
        return [
            (self._port(2 * link, outgoing.get(2 * link)), self._port(2 * link + 1, incoming.get(2 * link + 1)))
            for link in links
        ]

    def _port(self, port: int, messages: list[tuple[int, int]] | None) -> Port | None:
        if not messages:
            return None
        own = [self.cost.rows_per_expert(s) * self.cost.row_bytes for s in self.choice.sequences]
        per_class = [0.0] * len(self.classes)
        for source, target in messages:
            per_class[self.class_of[target]] += own[source]
        users = tuple(sorted({self.class_of[target] for _, target in messages}))
        seconds, latency = self.cost.network.link(port)
        hosts = len({target for _, target in messages})
        if port % 2 or not self._leaves_node(messages):
            return Port(0.0, tuple(per_class), users, seconds, latency, hosts, port)
        return replace(self._uplink(messages, own, users, seconds, latency), number=port)

    def _leaves_node(self, messages: list[tuple[int, int]]) -> bool:
        source, target = messages[0]
        return self.cost.devices[source].node != self.cost.devices[target].node

    def _uplink(
        self, messages: list[tuple[int, int]], own: list[float], users: tuple[int, ...], seconds: float, latency: float
    ) -> Port:
        """A NIC's way out: all rows of its sources but those for replicated experts and hosts in the same node."""
        sources = sorted({source for source, _ in messages})
        node = self.cost.devices[sources[0]].node
        total = sum(own[source] for source in sources)
        per_class = [0.0] * len(self.classes)
        for device in self.cost.devices:
            if device.node == node:
                per_class[self.class_of[device.rank]] -= total
        return Port(total, tuple(per_class), users, seconds, latency, 0)

    def leads(self, first: int, other: int) -> bool:
        """Whether the only device of one class may be taken to host at least as much as any device of another one."""
        (rank, *more), others = self.classes[first].ranks, self.classes[other].ranks
        return not more and all(self._symmetries.leads(rank, following) for following in others)

    @cached_property
    def _symmetries(self) -> Symmetries:
        return Symmetries(self.cost.devices, self.choice.sequences)
