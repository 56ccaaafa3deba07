"""The MILP's variables by what they mean, and what of a class hosts how much."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import pulp

from hetermoe_cli.planner.bounds.patterns import Limits
from hetermoe_cli.planner.instance.choice import DeviceClass
from hetermoe_cli.planner.instance.graph import TaskGraph
from hetermoe_cli.planner.instance.rates import Rates
from hetermoe_cli.schedule.action import Action, Kind

Mode = Literal["largest", "mean"]


@dataclass
class Model:
    """The PuLP problem and its variables by what they mean; times are in units of `unit` seconds, which the makespan
    takes at most: in them, 1.
    """

    unit: float
    rates: Rates
    graph: TaskGraph
    mode: Mode
    limits: Limits
    problem: pulp.LpProblem
    hosted: dict[tuple[int, int], Any] = field(default_factory=dict)  # most on one device of a class, [layer, class]
    spare: dict[tuple[int, int], Any] = field(default_factory=dict)  # devices with one less
    uneven: dict[tuple[int, int], Any] = field(default_factory=dict)
    hosts: dict[tuple[int, int], Any] = field(default_factory=dict)  # whether any device of the class hosts
    all_host: dict[tuple[int, int], Any] = field(default_factory=dict)
    replicated: list[Any] = field(default_factory=list)
    total: list[Any] = field(default_factory=list)  # experts of all layers on the fullest device of a class
    transfer: list[Any] = field(default_factory=list)
    shares: dict[tuple[int, int], Any] = field(default_factory=dict)
    ring: dict[int, Any] = field(default_factory=dict)  # whether a layer's transfers use a port of the all-reduce
    start: list[Any] = field(default_factory=list)
    finish: Any = None
    optimizer: Any = None

    @cached_property
    def transfers(self) -> dict[Action, int]:
        """Node of every dispatch and combine."""
        kinds = (Kind.DISPATCH, Kind.COMBINE)
        return {task.action: node for node, task in enumerate(self.graph.tasks) if task.action.kind in kinds}

    @property
    def layers(self) -> range:
        """Layer numbers."""
        return range(self.rates.layers)

    @property
    def classes(self) -> list[tuple[int, DeviceClass]]:
        """Numbered classes."""
        return list(enumerate(self.rates.classes))

    def flag(self, layer: int, number: int) -> Any:
        """The binary that brings a class's expert task into the dependencies.

        Where the mean is charged, a device that hosts nothing must not make its class's mean later than the answer that
        the others give. In a class that only hosts none does: what is left of the layer before ends before that layer's
        last answer, which this layer's answers follow. On an attending device attention may run longer.
        """
        sure = self.mode == "largest" or not self.rates.classes[number].attends
        return (self.hosts if sure else self.all_host)[layer, number]

    def mean(self, layer: int, number: int) -> Any:
        """Mean hosted experts of a device of the class."""
        count = self.rates.classes[number].count
        hosted = self.hosted[layer, number]
        return hosted if count == 1 else hosted - self.spare[layer, number] * (1 / count)

    def least(self, layer: int, number: int) -> Any:
        """Hosted experts of the device with fewest (in the mean model: on average)."""
        if self.rates.classes[number].count == 1:
            return self.hosted[layer, number]
        if self.mode == "mean":
            return self.mean(layer, number)
        return self.hosted[layer, number] - self.uneven[layer, number]
