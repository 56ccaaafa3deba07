"""Change: devices added to a cluster or taken away, in words and applied."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.cluster import MOST_DEVICES, ClusterSpec, NodeGroup

_PART = re.compile(r"([+-])\s*(\d+)\s+(\S+)")


@dataclass(frozen=True)
class Change:
    """Devices added (positive) or removed (negative), in order."""

    parts: tuple[tuple[int, str], ...]

    def __str__(self) -> str:
        return ", ".join(f"{count:+d} {device}" for count, device in self.parts)


def parse_change(text: str) -> Change:
    """`+2 A40`, or several with commas between: `+1 A40,-2 V100`. UserError on anything else."""
    parts = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if not match or not int(match[2]):
            raise UserError(
                f"--what-if {text!r}: {part.strip()!r} is no change: write '+2 A40' or '-1 V100', several with commas"
            )
        parts.append((int(match[1] + match[2]), match[3]))
    return Change(tuple(parts))


def one_more_of_each(cluster: ClusterSpec) -> list[Change]:
    """The marginal changes: one more device of each type."""
    return [Change(((1, device),)) for device in cluster.device_types]


def changed_cluster(cluster: ClusterSpec, change: Change) -> ClusterSpec:
    """The cluster after `change`. UserError if it has fewer devices than are to go, or if none would be left."""
    nodes = list(cluster.nodes)
    for count, device in change.parts:
        nodes = [*nodes, _added(nodes, device, count)] if count > 0 else _removed(nodes, device, -count, change)
    if not nodes:
        raise UserError(f"--what-if {str(change)!r}: no device would be left")
    changed = cluster.model_copy(update={"nodes": nodes})
    if changed.world_size > MOST_DEVICES:
        raise UserError(
            f"--what-if {str(change)!r}: {changed.world_size} devices, at most {MOST_DEVICES} can be planned"
        )
    return changed


def _added(nodes: Sequence[NodeGroup], device: str, count: int) -> NodeGroup:
    """`count` nodes of one device each, on machines of their own, otherwise like the type's last node group.

    A type that the cluster lacks gets the links of its first group, and no price.
    """
    alike = [group for group in nodes if group.device == device]
    names = {group.name for group in nodes}
    name = f"added-{device}"
    while name in names:
        name += "+"
    update: dict[str, object] = {
        "name": name, "device": device, "count": count, "devices": 1, "nics": 1, "machine": None,
    }  # fmt: skip
    if not alike:
        update["price_per_hour"] = None
    return (alike or nodes)[-1 if alike else 0].model_copy(update=update)


def _removed(nodes: Sequence[NodeGroup], device: str, count: int, change: Change) -> list[NodeGroup]:
    """Without the last `count` devices of a type: whole nodes, then devices of a node, which keeps a NIC for each."""
    have = sum(group.count * group.devices for group in nodes if group.device == device)
    if have < count:
        raise UserError(f"--what-if {str(change)!r}: {count} {device} to remove, there are {have}")
    result: list[NodeGroup] = []
    for group in reversed(nodes):
        gone = min(count, group.count * group.devices) if group.device == device else 0
        count -= gone
        result = [*_shrunk(group, gone), *result]
    return result


def _shrunk(group: NodeGroup, gone: int) -> list[NodeGroup]:
    """The group without its last `gone` devices."""
    whole, rest = divmod(group.count * group.devices - gone, group.devices)
    full = [group.model_copy(update={"count": whole})] if whole else []
    if not rest:
        return full
    name = f"{group.name}-rest" if whole else group.name
    return [*full, group.model_copy(update={"name": name, "count": 1, "devices": rest, "nics": min(group.nics, rest)})]
