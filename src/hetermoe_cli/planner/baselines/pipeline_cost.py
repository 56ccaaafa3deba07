"""Seconds and bytes of pipeline stages. A stage is a unit of devices with expert parallelism inside.

Each device of a unit attends to an equal part of the micro-batch and hosts an equal part of every layer's experts
(rounded up); the unit's all-to-alls overlap with nothing, since a stage works on one micro-batch at a time. The router
is taken as balanced: a unit holds all experts of its layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor

import numpy as np

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.spec.layout import ScheduleChoice
from hetermoe_cli.spec.train import Recompute

Unit = tuple[int, ...]  # ranks


@dataclass(frozen=True)
class TypeCost:
    """A device of one type in a unit. Seconds of a layer and micro-batch, bytes of a layer; no messages."""

    forward: float
    backward: float  # with what is computed again
    dense: tuple[float, float]  # forward and backward of the dense layers, on the first stage
    head: float  # last norm, head, loss and their backward, at once
    kept: float  # activations of a layer and micro-batch
    kept_dense: float  # activations of the dense layers and a micro-batch
    working: float  # largest working set of an attention and an expert task
    working_dense: float  # that of the dense layers, where they are computed again
    working_head: float  # the same where the head runs
    usable: float  # memory limit less framework and message buffers


@dataclass(frozen=True)
class UnitCost:
    """A unit as fast as its slowest device, with its all-to-alls. Seconds of a layer and micro-batch."""

    forward: float
    backward: float
    dense: tuple[float, float]
    head: float

    @property
    def layer(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


class PipelineCost:
    """Costs of units of `width` devices on micro-batches of `sequences` sequences."""

    def __init__(self, cost: CostModel, sequences: int, width: int, recompute: Recompute) -> None:
        self.cost, self.sequences, self.width = cost, sequences, width
        self.hosted = -(-cost.model.experts // width)
        self._again = ScheduleChoice.sequential(1, recompute=recompute)
        self._units: dict[Unit, UnitCost] = {}
        self.types = {name: self._type(name) for name in cost.types}

    @property
    def message_bytes(self) -> float:
        """Hidden states, or their gradients, that a device passes on: its part of a micro-batch."""
        return self.sequences / self.width * self.cost.train.sequence_length * self.cost.row_bytes

    def _type(self, name: str) -> TypeCost:
        cost, device, own = self.cost, self.cost.types[name], self.sequences // self.width
        rows, again = cost.rows_per_expert(self.sequences), self._again
        attention, expert, head = device.attention(own), device.expert(rows), cost.head_cost(device, own)
        dense = cost.dense_cost(device, own)
        repeated = again.recompute_attention * attention.forward
        repeated += again.recompute_experts * self.hosted * expert.forward
        buffers = 4 * self.message_bytes  # one message each way, forward and backward
        if self.width > 1:
            buffers += cost.buffer_bytes(self.sequences, own, self.hosted / cost.model.experts, again)
        return TypeCost(
            forward=attention.forward + self.hosted * expert.forward,
            backward=attention.backward + self.hosted * expert.backward + repeated,
            dense=(dense.forward, dense.backward + again.recompute_attention * dense.forward),
            head=head.forward + head.backward,
            kept=cost.attention_activation_bytes(device, own, again.recompute_attention)
            + self.hosted * cost.expert_activation_bytes(device, rows, again),
            kept_dense=cost.border_bytes(own, 1) if again.recompute_attention else dense.saved_bytes,
            working=attention.saved_bytes + expert.saved_bytes,
            working_dense=again.recompute_attention * dense.saved_bytes,
            working_head=cost.transient_bytes(device, own, again) + expert.saved_bytes,
            usable=device.memory_bytes * cost.train.memory_headroom - device.framework_bytes - buffers,
        )

    def unit(self, unit: Unit) -> UnitCost:
        """Seconds of a unit."""
        if unit not in self._units:
            kinds = [self.types[name] for name in {self.cost.devices[rank].type for rank in unit}]
            exchange = self._exchange_seconds(unit)  # twice each way: dispatch and combine
            self._units[unit] = UnitCost(
                max(kind.forward for kind in kinds) + 2 * exchange,
                max(kind.backward for kind in kinds) + (2 + self._again.sends_again) * exchange,
                max((kind.dense for kind in kinds), key=sum),
                max(kind.head for kind in kinds),
            )
        return self._units[unit]

    def extra(self, units: Sequence[Unit]) -> list[float]:
        """Seconds of what the stages of a pipeline have beside layers: dense layers first, the head last."""
        result = [0.0] * len(units)
        result[0] += sum(self.unit(units[0]).dense)
        result[-1] += self.unit(units[-1]).head
        return result

    def _exchange_seconds(self, unit: Unit) -> float:
        if len(unit) == 1:
            return 0.0
        rows = self.cost.rows_per_expert(self.sequences // self.width) * self.hosted
        sent = np.zeros((len(self.cost.devices), len(unit)))
        sent[list(unit)] = rows * self.cost.travelling_share(self.hosted) * self.cost.row_bytes
        return self.cost.network.seconds(sent, np.array(unit))

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of a layer that a device holds."""
        return self.cost.model.attention_layer_parameters + self.hosted * self.cost.model.expert_parameters

    def edge_parameters(self, first: bool, last: bool) -> int:
        """Embedding and dense layers on the first stage; final norm and head on the last."""
        model = self.cost.model
        embedding = model.vocab_size * model.hidden_size
        dense = model.dense_layers * model.dense_layer_parameters
        return first * (embedding + dense) + last * (model.edge_parameters - embedding)

    def most_layers(self, unit: Unit, in_flight: int, first: bool, last: bool) -> int:
        """Layers that every device of a unit holds with `in_flight` micro-batches between forward and backward."""
        state = sum(STATE_BYTES[self.cost.train.precision])
        edges, layer, room = self.edge_parameters(first, last) * state, self.layer_parameters * state, []
        for name in {self.cost.devices[rank].type for rank in unit}:
            kind = self.types[name]
            left = kind.usable - (kind.working_head if last else kind.working) - edges
            left -= first * (in_flight * kind.kept_dense + kind.working_dense)
            room.append(floor(left / (layer + in_flight * kind.kept)))
        return max(0, min(room))

    def update_seconds(self, pipelines: Sequence[Sequence[tuple[Unit, int]]]) -> float:
        """What of the all-reduce follows the last backward, then the slowest optimizer step.

        Pipelines: (unit, layers) of every stage.
        """
        steps = [
            self.cost.optimizer_seconds(
                self.cost.of(rank),
                layers * self.layer_parameters + self.edge_parameters(stage == 0, stage == len(pipeline) - 1),
            )
            for pipeline in pipelines
            for stage, (unit, layers) in enumerate(pipeline)
            for rank in unit
        ]
        return all_reduce_seconds(self.cost, self._rings(pipelines)) + max(steps)

    def _rings(self, pipelines: Sequence[Sequence[tuple[Unit, int]]]) -> Iterator[tuple[Unit, int]]:
        """(ranks, gradient bytes) of layer 0 and what comes before it, whose backward comes last: the dense part over
        all devices that hold it, experts over those of equal place.

        All other gradients are taken to travel during backward, as those of a layout do, and in the rival's favour to
        hold up none of its messages.
        """
        gradient, model = STATE_BYTES[self.cost.train.precision][1], self.cost.model
        units = [pipeline[0][0] for pipeline in pipelines]
        dense = model.attention_layer_parameters + self.edge_parameters(True, False)
        yield _together(units), dense * gradient
        experts = self.hosted * model.expert_parameters * gradient
        yield from ((ranks, experts) for ranks in zip(*units, strict=True))


def _together(units: Sequence[Unit]) -> Unit:
    return tuple(sorted(rank for unit in units for rank in unit))


def all_reduce_seconds(cost: CostModel, rings: Iterator[tuple[Unit, int]]) -> float:
    """Ring all-reduces of so many bytes at the same time, one after another where they have a port in common."""
    sizes: dict[Unit, int] = {}
    for ranks, size in rings:
        sizes[ranks] = sizes.get(ranks, 0) + size
    network = cost.network
    busy = [0.0] * network.count
    for ranks, size in sizes.items():
        m = len(ranks)
        for port in network.ring_ports(ranks):
            byte_seconds, latency = network.ring_link(port)
            busy[port] += 2 * (m - 1) * (size / m * byte_seconds + latency)
    return max(busy)
