"""ClusterSpec: nodes, devices, links; and the link records that it names."""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.base import ExtendedSpec, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Spec

MOST_DEVICES = 16384  # the cost model keeps figures of pairs of them
LEAST_BANDWIDTH = 1e-6  # gigabytes a second: a modem


class Link(ExtendedSpec):
    """One direction of a link: a message of b bytes takes b / bandwidth + latency.

    `all_reduce_gigabytes_per_second`: what a ring all-reduce moves over it, as NCCL's tests count it ("bus bandwidth":
    2 (m - 1) / m of the bytes); None: as much as messages.
    """

    later: ClassVar[frozenset[str]] = frozenset({"all_reduce_gigabytes_per_second"})

    bandwidth_gigabytes_per_second: Annotated[PositiveFloat, Field(ge=LEAST_BANDWIDTH)]
    latency_microseconds: NonNegativeFloat
    all_reduce_gigabytes_per_second: Annotated[PositiveFloat, Field(ge=LEAST_BANDWIDTH)] | None = None

    @property
    def ring_bandwidth(self) -> float:
        """Bytes a second of an all-reduce's ring."""
        return 1e9 * (self.all_reduce_gigabytes_per_second or self.bandwidth_gigabytes_per_second)


def _form(value: object) -> str:
    return "name" if isinstance(value, str) else "numbers"


# Told apart by their form, so that an error in the numbers does not say that a name was expected.
LinkOrName = Annotated[Annotated[str, Tag("name")] | Annotated[Link, Tag("numbers")], Discriminator(_form)]


class LinkRecord(Spec):
    """A named link (profiles/links/NAME.yaml), measured between workers or stated from a data sheet."""

    kind: Literal["link"] = "link"
    schema_version: Literal[1] = 1
    name: str
    source: Literal["measured", "modelled"]
    date: date
    link: Link
    spread: NonNegativeFloat | None = None
    comment: str = ""


class NodeGroup(ExtendedSpec):
    """`count` equal nodes, each with `devices` devices of one type.

    `network` is one NIC's link to other nodes, `interconnect` a device's link to its neighbours inside the node;
    either a link record's name or numbers. With fewer NICs than devices, neighbouring devices share one.
    `price_per_hour` is what one device costs an hour, in dollars (any one currency, if all node groups use the same).
    Groups that name the same `machine` are the device types of one node, each with NICs of its own.
    """

    later: ClassVar[frozenset[str]] = frozenset({"price_per_hour", "machine"})

    name: str
    count: PositiveInt = 1
    device: str
    devices: PositiveInt
    nics: PositiveInt = 1
    network: LinkOrName
    interconnect: LinkOrName
    price_per_hour: PositiveFloat | None = None
    machine: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "NodeGroup":
        if self.nics > self.devices:
            raise ValueError(f"nics {self.nics} is larger than devices {self.devices}")
        if self.machine is not None and self.count > 1:
            raise ValueError(f"machine {self.machine} is one node, count is {self.count}: write a node group for each")
        return self


class ClusterSpec(Spec):
    """The whole cluster. Ranks are numbered through nodes, in file order."""

    kind: Literal["cluster"] = "cluster"
    schema_version: Literal[1] = 1
    name: str
    nodes: list[NodeGroup] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "ClusterSpec":
        names = [node.name for node in self.nodes]
        if len(set(names)) != len(names):
            raise ValueError(f"node names must differ, found {names}")
        if self.world_size > MOST_DEVICES:
            raise ValueError(
                f"{self.world_size} devices, at most {MOST_DEVICES} can be planned: check count and devices"
            )
        return self

    @property
    def world_size(self) -> int:
        """Number of devices."""
        return sum(node.count * node.devices for node in self.nodes)

    @property
    def device_types(self) -> list[str]:
        """Distinct device types in file order."""
        return list(dict.fromkeys(node.device for node in self.nodes))

    def link_names(self) -> set[str]:
        """Names of the link records that this cluster refers to."""
        return {link for node in self.nodes for link in (node.network, node.interconnect) if isinstance(link, str)}

    @property
    def node_names(self) -> list[str]:
        """Of every node: its `machine`, or its node group, numbered where that has several."""
        names = {}
        for group in self.nodes:
            for number in range(group.count):
                name = group.name if group.count == 1 else f"{group.name}.{number}"
                names[group.machine, "" if group.machine else name] = group.machine or name
        return list(names.values())

    @property
    def group_of_rank(self) -> list[int]:
        """Which of `nodes` each rank belongs to."""
        return [index for index, node in enumerate(self.nodes) for _ in range(node.count * node.devices)]


class Origin(Spec):
    """The cluster that a smaller one was taken from, and which of its ranks that has, in order."""

    cluster: ClusterSpec
    ranks: list[NonNegativeInt]


class Device(Spec):
    """One rank's place in the cluster; `node` and `nic` are numbered over the whole cluster."""

    rank: int
    type: str
    node: int
    nic: int
    network: Link
    interconnect: Link


def devices(cluster: ClusterSpec, links: Mapping[str, Link]) -> list[Device]:
    """Expand the cluster into one Device per rank, with link names resolved through `links`."""

    def resolve(link: str | Link, node: NodeGroup, field: str) -> Link:
        if isinstance(link, Link):
            return link
        if link not in links:
            raise UserError(f"cluster {cluster.name}: field nodes.{node.name}.{field}: no link record named {link!r}")
        return links[link]

    result: list[Device] = []
    machines: dict[str, int] = {}
    nodes = nic_index = 0
    for group in cluster.nodes:
        network = resolve(group.network, group, "network")
        interconnect = resolve(group.interconnect, group, "interconnect")
        for _ in range(group.count):
            node = nodes if group.machine is None else machines.setdefault(group.machine, nodes)
            for local in range(group.devices):
                result.append(
                    Device(
                        rank=len(result),
                        type=group.device,
                        node=node,
                        nic=nic_index + local * group.nics // group.devices,
                        network=network,
                        interconnect=interconnect,
                    )
                )
            nodes += node == nodes
            nic_index += group.nics
    return result


def subcluster(cluster: ClusterSpec, ranks: Sequence[int]) -> ClusterSpec:
    """The cluster of `ranks` alone, in ascending order, whole nodes or parts of nodes.

    UserError for a part of a node whose devices share NICs, unless all ranks lie in that node and need none: a NIC
    must not serve two groups.
    """
    taken: list[tuple[int, int]] = []  # (index in cluster.nodes, devices taken) of every node used
    wanted, first = set(ranks), 0
    for index, group in enumerate(cluster.nodes):
        for _ in range(group.count):
            count = len(wanted.intersection(range(first, first + group.devices)))
            taken += [(index, count)] * bool(count)
            first += group.devices
    if not taken or sum(count for _, count in taken) != len(ranks):
        raise UserError(f"cluster {cluster.name}: ranks {list(ranks)} are not distinct ranks of it")
    nodes: list[NodeGroup] = []
    previous: tuple[int, int] | None = None
    for index, count in taken:
        if (index, count) == previous:
            nodes[-1] = nodes[-1].model_copy(update={"count": nodes[-1].count + 1})
            continue
        nodes.append(_part(cluster, cluster.nodes[index], count, len(taken), len(nodes)))
        previous = (index, count)
    return cluster.model_copy(update={"nodes": nodes})


def _part(cluster: ClusterSpec, group: NodeGroup, count: int, used: int, number: int) -> NodeGroup:
    """One node of `group`, or `count` of its devices."""
    changes: dict[str, object] = {"name": f"{group.name}.{number}", "count": 1}
    if count < group.devices:
        if group.nics < group.devices and used > 1:
            raise UserError(
                f"cluster {cluster.name}: field nodes.{group.name}: {count} of a node's {group.devices} devices cannot "
                f"join other nodes: they share {group.nics} NICs with the rest: take whole nodes"
            )
        changes |= {"devices": count, "nics": count if group.nics == group.devices else 1}
    return group.model_copy(update=changes)
