"""Inputs: everything that a plan was computed from."""

from typing import Any, ClassVar

from pydantic import Field

from hetermoe_cli.spec.base import ExtendedSpec, sha256
from hetermoe_cli.spec.cluster import ClusterSpec, Device, Link, Origin, devices
from hetermoe_cli.spec.load import ExpertLoad
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.profile import Profile
from hetermoe_cli.spec.train import TrainSpec


class Inputs(ExtendedSpec):
    """Everything a plan was computed from; profiles hold only the kernel tables that were used.

    `modelled_links`: those whose records come from data sheets. Without `expert_load` the router is balanced. `origin`:
    of a plan that runs without the devices that it leaves out.
    """

    later: ClassVar[frozenset[str]] = frozenset({"modelled_links"})

    model: ModelConfig
    cluster: ClusterSpec
    links: dict[str, Link]
    modelled_links: list[str] = Field(default_factory=list)
    profiles: dict[str, Profile]
    train: TrainSpec
    expert_load: ExpertLoad | None = None
    origin: Origin | None = None

    def hashes(self) -> dict[str, str]:
        """sha256 of every input, by name."""
        result = {"model": sha256(self.model), "cluster": sha256(self.cluster), "train": sha256(self.train)}
        result |= {f"links.{name}": sha256(link) for name, link in sorted(self.links.items())}
        result |= {f"profiles.{name}": sha256(profile) for name, profile in sorted(self.profiles.items())}
        result |= {"expert_load": sha256(self.expert_load)} if self.expert_load else {}
        return result

    def with_train(self, **changes: Any) -> "Inputs":
        """The same with changes of the training spec."""
        return self.model_copy(update={"train": self.train.model_copy(update=changes)})

    def devices(self) -> list[Device]:
        """One Device per rank."""
        return devices(self.cluster, self.links)

    @property
    def nodes(self) -> list[list[int]]:
        """The ranks of every node, both in the order of the cluster file."""
        found: dict[int, list[int]] = {}
        for device in self.devices():
            found.setdefault(device.node, []).append(device.rank)
        return [found[node] for node in sorted(found)]

    @property
    def whole(self) -> "Inputs":
        """The same with all devices of the cluster file."""
        return self.model_copy(update={"cluster": self.origin.cluster, "origin": None}) if self.origin else self

    @property
    def node_numbers(self) -> list[int]:
        """Of every node: its number in the cluster file, where those that are left out count too."""
        if not self.origin:
            return list(range(len(self.nodes)))
        whole = self.whole.devices()
        return [whole[self.origin.ranks[ranks[0]]].node for ranks in self.nodes]

    def accelerators(self) -> list[str]:
        """cpu or cuda, for every rank."""
        return [self.profiles[device.type].accelerator for device in self.devices()]

    def device_index(self, rank: int) -> int:
        """Which of its node's devices of one accelerator `rank` works on: they go to ranks in turn, and those that are
        left out count too."""
        if self.origin:
            return self.whole.device_index(self.origin.ranks[rank])
        places = [(d.node, kind) for d, kind in zip(self.devices(), self.accelerators(), strict=True)]
        return places[:rank].count(places[rank])
