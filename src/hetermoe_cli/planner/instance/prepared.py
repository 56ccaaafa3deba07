"""A choice made ready: classes, rates, and the task graph when it is asked for."""

from dataclasses import dataclass
from functools import cached_property

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.instance.choice import Choice, DeviceClass, group
from hetermoe_cli.planner.instance.counts import Counts
from hetermoe_cli.planner.instance.deal import deal
from hetermoe_cli.planner.instance.graph import TaskGraph, coarse, task_graph
from hetermoe_cli.planner.instance.rates import Rates
from hetermoe_cli.spec.layout import Layout


@dataclass
class Prepared:
    """Everything that heuristics and MILP read about one choice."""

    choice: Choice
    classes: list[DeviceClass]
    rates: Rates

    @classmethod
    def of(cls, cost: CostModel, choice: Choice, apart: int = 0) -> "Prepared":
        """By classes, of which the first `apart` devices are some of their own (`group`)."""
        classes = group(cost.devices, choice.sequences, apart)
        return cls(choice, classes, Rates(cost, choice, classes))

    @cached_property
    def tasks(self) -> TaskGraph:
        """All tasks of one iteration."""
        return task_graph(self.choice, self.classes, self.rates.layers)

    @cached_property
    def graph(self) -> TaskGraph:
        """Tasks of one iteration, as few as its makespan needs."""
        schedule = self.choice.schedule
        return coarse(self.tasks, schedule.window) if schedule.in_default_order else self.tasks

    @property
    def single(self) -> bool:
        """Whether every class is one device, so that the model is exact as it is."""
        return all(c.count == 1 for c in self.classes)

    def layout(self, counts: Counts) -> Layout:
        """The layout of `counts`."""
        return self.choice.layout(deal(self.classes, counts, len(self.choice.sequences)))
