"""What a composition of devices is worth, and whether it can hold the model, before anything is placed on it."""

from functools import cached_property
from math import gcd

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.cluster.compositions import Composition
from hetermoe_cli.planner.cluster.objective import Wanted
from hetermoe_cli.planner.cluster.packing import Limits

FINEST = 128  # parts of the batch that shares are multiples of


class Worth:
    """Judges compositions of one cluster."""

    def __init__(self, cost: CostModel, wanted: Wanted, limits: Limits) -> None:
        self.cost, self.wanted, self.limits = cost, wanted, limits
        self.cluster = cost.inputs.cluster

    def value(self, c: Composition) -> float:
        """What the composition's devices are worth: dollars for the cost objective, else work."""
        if self.wanted.objective == "cost":
            return self.limits.price(c)
        return sum(s * count for s, count in zip(self.speeds, c, strict=True))

    @cached_property
    def speeds(self) -> list[float]:
        """Work a second of one device of each node group: sequences with their expert rows."""
        model, train = self.cost.model, self.cost.train
        result = []
        for node in self.cluster.nodes:
            device = self.cost.types[node.device]
            rows = self.cost.rows_per_expert(max(1, min(self.limits.batch, 64)))
            row = sum(device.expert(rows)[:2]) / rows
            attention = self.cost.attending_seconds(device, 1)
            result.append(1 / (attention + row * model.layers * train.sequence_length * model.top_k))
        return result

    def promise(self, c: Composition) -> tuple[int, bool, int]:
        """Equal parts of everything first, then single node groups, pairs, others; of these first what leaves no
        devices over, then large ones."""
        kinds = sum(count > 0 for count in c)
        parts = {most / count for count, most in zip(c, self.limits.devices, strict=True) if count}
        equal = len(parts) == 1
        rank = 0 if equal and kinds == len(c) else 1 if kinds == 1 else 2 if equal else 3
        rest = any(most % count for count, most in zip(c, self.limits.devices, strict=True) if count)
        return rank, rest, -sum(c)

    def holds(self, c: Composition, sharing: int) -> bool:
        """Whether the devices' memory holds one copy of all states; of optimizer states what `sharing` groups leave to
        each, where they may share them out."""
        weights, gradients, optimizer = STATE_BYTES[self.cost.train.precision]
        shared = sharing if self.cost.train.dense_state != "replicated" else 1
        held = sum(
            count * (device.memory_bytes * self.cost.train.memory_headroom - device.framework_bytes)
            for count, node in zip(c, self.cluster.nodes, strict=True)
            for device in [self.cost.types[node.device]]
        )
        return held >= self.cost.model.parameters * (weights + gradients + optimizer / shared)

    def affordable(self, c: Composition) -> bool:
        """Whether it costs no more than allowed."""
        return self.wanted.most_cost is None or self.limits.price(c) <= self.wanted.most_cost


def finest(batch: int) -> int:
    """What shares of the batch are multiples of: a power of two that divides it, at most a 128th of it."""
    power = 1
    while 2 * power * FINEST <= batch:
        power *= 2
    return gcd(power, batch)
