"""Seconds and bytes of pipeline stages. A stage is a unit of devices with expert parallelism inside.

Each device of a unit attends to an equal part of the micro-batch and hosts an equal part of every layer's experts
(rounded up). The unit's all-to-alls overlap with nothing where a stage works on one micro-batch at a time, and with the
compute of the others in windows of several: an estimate, which a replay corrects. The router is taken as balanced: a
unit holds all experts of its layers.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.memory import Piece
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.spec.layout import Span
from hetermoe_cli.spec.train import DenseState, Recompute

Unit = tuple[int, ...]  # ranks


def stage_state(cost: CostModel) -> DenseState:
    """What stages share of the dense part's state: optimizer states, unless the training spec wants all of it whole."""
    return "replicated" if cost.train.dense_state == "replicated" else "optimizer"


@dataclass(frozen=True)
class UnitCost:
    """A device of one type in a unit, or a unit as fast as its slowest device, with its all-to-alls. Seconds of a layer
    and micro-batch."""

    forward: float
    backward: float  # with what is computed again
    dense: tuple[float, float]  # forward and backward of the dense layers, on the first stage
    head: float  # last norm, head, loss and their backward, at once

    @property
    def layer(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


class PipelineCost:
    """Costs of units of `width` devices on micro-batches of `sequences` sequences, `window` of them in flight together
    on a stage."""

    def __init__(self, cost: CostModel, sequences: int, width: int, recompute: Recompute, window: int = 1) -> None:
        self.cost, self.sequences, self.width = cost, sequences, width
        self.hosted = -(-cost.model.experts // width)
        self.schedule = cost.schedule(window, window, recompute, stage_state(cost))
        self._units: dict[Unit, UnitCost] = {}
        self._most: dict[tuple[str, int, bool, bool], int] = {}
        self.types = {name: self._type(name) for name in cost.types}

    @property
    def message_bytes(self) -> float:
        """Hidden states, or their gradients, that a device passes on: its part of a micro-batch."""
        return self.sequences / self.width * self.cost.train.sequence_length * self.cost.row_bytes

    def _type(self, name: str) -> UnitCost:
        cost, device, own = self.cost, self.cost.types[name], self.sequences // self.width
        attention, dense = device.attention(own), cost.dense_cost(device, own)
        expert, head = device.expert(cost.rows_per_expert(self.sequences)), cost.head_cost(device, own)
        repeated = self.schedule.recompute_attention * attention.forward
        repeated += self.schedule.recompute_experts * self.hosted * expert.forward
        return UnitCost(
            forward=attention.forward + self.hosted * expert.forward,
            backward=attention.backward + self.hosted * expert.backward + repeated,
            dense=(dense.forward, dense.backward + self.schedule.recompute_attention * dense.forward),
            head=head.forward + head.backward,
        )

    def unit(self, unit: Unit) -> UnitCost:
        """Seconds of a unit."""
        if unit not in self._units:
            kinds = [self.types[name] for name in {self.cost.devices[rank].type for rank in unit}]
            exchange = self._exchange_seconds(unit)  # twice each way: dispatch and combine
            self._units[unit] = UnitCost(
                self._overlapped(max(kind.forward for kind in kinds), 2 * exchange),
                self._overlapped(max(kind.backward for kind in kinds), (2 + self.schedule.sends_again) * exchange),
                max((kind.dense for kind in kinds), key=sum),
                max(kind.head for kind in kinds),
            )
        return self._units[unit]

    def _overlapped(self, computed: float, sent: float) -> float:
        """Of a micro-batch: in a window, messages travel while others are computed; one alone has it all in turn."""
        alone = computed + sent
        return alone if self.schedule.window == 1 else max(computed, sent, alone / self.schedule.window)

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
        """Layers that every device of a unit holds with `in_flight` windows between forward and backward."""
        types = {self.cost.devices[rank].type for rank in unit}
        return min([self._most_on(name, in_flight, first, last) for name in types])

    def _most_on(self, name: str, in_flight: int, first: bool, last: bool) -> int:
        key = name, in_flight, first, last
        if key not in self._most:
            limit = self.cost.types[name].memory_bytes * self.cost.train.memory_headroom
            counts = range(1, self.cost.model.layers)  # a pipeline has two stages at least
            needed = partial(self._needed, name, in_flight, first, last)
            self._most[key] = bisect_right(counts, limit, key=needed)
        return self._most[key]

    def _needed(self, name: str, in_flight: int, first: bool, last: bool, layers: int) -> int:
        """Bytes of a device that holds so many layers."""
        model, end = self.cost.model, layers if first else 1 + layers
        span = Span(0, 0 if first else 1, end, (), (), 0 if last else 1, self.schedule)
        if last:
            span = span._replace(first=model.layers - layers, end=model.layers)
        return self.cost.memory(
            self.cost.types[name],
            sequences=self.sequences // self.width,
            sequences_per_micro_batch=self.sequences,
            schedule=self.schedule,
            hosted=[self.hosted] * layers,
            replicated=[],
            attending=self.width,
            stepped=self._stepped(layers, first, last),
            piece=Piece(span, in_flight),
        ).total_bytes

    def _stepped(self, layers: int, first: bool, last: bool) -> float:
        """Parameters that a device updates: of the dense part its share, where that is shared out."""
        dense = layers * self.cost.model.attention_layer_parameters + self.edge_parameters(first, last)
        experts = layers * self.hosted * self.cost.model.expert_parameters
        return (
            self.cost.dense_share(self.schedule, self.width) * dense
            + self.cost.state_share(self.schedule, 1) * experts
        )

    def update_seconds(self, pipelines: Sequence[Sequence[tuple[Unit, int]]]) -> float:
        """What of the all-reduce follows the last backward, new weights of what is shared out, then the slowest
        optimizer step.

        Pipelines: (unit, layers) of every stage.
        """
        steps, gathers = [0.0], [0.0]
        for pipeline in pipelines:
            for stage, (unit, layers) in enumerate(pipeline):
                first, last = stage == 0, stage == len(pipeline) - 1
                stepped = self._stepped(layers, first, last)
                steps += [self.cost.optimizer_seconds(self.cost.of(rank), stepped) for rank in unit]
                dense = layers * self.cost.model.attention_layer_parameters + self.edge_parameters(first, last)
                gathers.append(self.cost.after_backward_seconds(self.schedule, unit, 0, dense))
        return all_reduce_seconds(self.cost, self._rings(pipelines)) + max(gathers) + max(steps)

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
