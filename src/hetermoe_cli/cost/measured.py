"""MeasuredCost: a plan's costs with the expert load and the devices' speeds that a run has measured."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.load import ExpertLoad


class MeasuredState(NamedTuple):
    """What a run shows of its load (None: a balanced router) and of every rank's slowdown, its seconds over profiled
    ones."""

    load: ExpertLoad | None
    slowdown: Sequence[float]

    def of(self, ranks: Sequence[int]) -> "MeasuredState":
        """That of some ranks alone."""
        return MeasuredState(self.load, [self.slowdown[rank] for rank in ranks])


class MeasuredCost(CostModel):
    """`inputs` under `load`; every compute task of rank r takes `slowdown[r]` times its profiled seconds.

    Ranks of one type with different slowdowns count as different types.
    """

    def __init__(self, inputs: Inputs, load: ExpertLoad | None, slowdown: Sequence[float]) -> None:
        super().__init__(inputs.model_copy(update={"expert_load": load}))
        known = dict(self.types)
        names = [
            f"{d.type} x {factor:g}" if factor != 1 else d.type
            for d, factor in zip(self.devices, slowdown, strict=True)
        ]
        self.types = {}
        for name, device, factor in zip(names, self.devices, slowdown, strict=True):
            cost = known[device.type]
            self.types[name] = replace(
                cost,
                type=name,
                attention=cost.attention.slowed(factor),
                dense=cost.dense and cost.dense.slowed(factor),
                expert=cost.expert.slowed(factor),
                head=cost.head.slowed(factor),
                optimizer_seconds_per_parameter=cost.optimizer_seconds_per_parameter * factor,
            )
        self.devices = [d.model_copy(update={"type": name}) for d, name in zip(self.devices, names, strict=True)]
