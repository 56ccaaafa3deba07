"""ClusterSpec: nodes, devices, links; and the link records that it names."""

from collections.abc import Mapping
from datetime import date
from typing import Literal

from pydantic import Field, model_validator

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.base import NonNegativeFloat, PositiveFloat, PositiveInt, Spec


class Link(Spec):
    """One direction of a link: a message of b bytes takes b / bandwidth + latency."""

    bandwidth_gigabytes_per_second: PositiveFloat
    latency_microseconds: NonNegativeFloat


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


class NodeGroup(Spec):
    """`count` equal nodes, each with `devices` devices of one type.

    `network` is one NIC's link to other nodes, `interconnect` a device's link to its neighbours inside the node;
    either a link record's name or numbers. With fewer NICs than devices, neighbouring devices share one.
    """

    name: str
    count: PositiveInt = 1
    device: str
    devices: PositiveInt
    nics: PositiveInt = 1
    network: str | Link
    interconnect: str | Link

    @model_validator(mode="after")
    def _check(self) -> "NodeGroup":
        if self.nics > self.devices:
            raise ValueError(f"nics {self.nics} is larger than devices {self.devices}")
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
    node_index = nic_index = 0
    for group in cluster.nodes:
        network = resolve(group.network, group, "network")
        interconnect = resolve(group.interconnect, group, "interconnect")
        for _ in range(group.count):
            for local in range(group.devices):
                result.append(
                    Device(
                        rank=len(result),
                        type=group.device,
                        node=node_index,
                        nic=nic_index + local * group.nics // group.devices,
                        network=network,
                        interconnect=interconnect,
                    )
                )
            node_index += 1
            nic_index += group.nics
    return result
