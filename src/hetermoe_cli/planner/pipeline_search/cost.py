"""Seconds and bytes of pipeline stages. A stage is a unit of devices with expert parallelism inside.

Each device of a unit attends to an equal part of the micro-batch and hosts an equal part of every layer's experts
(rounded up). The unit's all-to-alls overlap with nothing where a stage works on one micro-batch at a time. Where a
forward is woven into a backward, what one waits for travels while the other computes: an estimate, which a replay
corrects. The router is taken as balanced: a unit holds all experts of its layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import floor

import numpy as np

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.spec.layout import Span
from hetermoe_cli.spec.schedule_choice import PassOrder
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
    layer: float  # both, as they follow each other or are woven into each other
    dense: tuple[float, float]  # forward and backward of the dense layers, on the first stage
    head: float  # last norm, head, loss and their backward, at once


class PipelineCost:
    """Costs of units of `width` devices on micro-batches of `sequences` sequences. `passes`: as of a schedule."""

    def __init__(
        self, cost: CostModel, sequences: int, width: int, recompute: Recompute, passes: PassOrder = "in_turn"
    ) -> None:
        self.cost, self.sequences, self.width = cost, sequences, width
        self.hosted = -(-cost.model.experts // width)
        self.schedule = cost.schedule(2, 1, recompute, stage_state(cost), passes)
        self._units: dict[Unit, UnitCost] = {}
        self._most: dict[tuple[str, int, bool, bool], int] = {}
        self._bytes: dict[tuple[str, bool, bool], list[list[int]]] = {}
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
        forward = attention.forward + self.hosted * expert.forward
        backward = attention.backward + self.hosted * expert.backward + repeated
        return UnitCost(
            forward=forward,
            backward=backward,
            layer=forward + backward,
            dense=(dense.forward, dense.backward + self.schedule.recompute_attention * dense.forward),
            head=head.forward + head.backward,
        )

    def unit(self, unit: Unit) -> UnitCost:
        """Seconds of a unit."""
        if unit not in self._units:
            kinds = [self.types[name] for name in {self.cost.devices[rank].type for rank in unit}]
            exchange = self._exchange_seconds(unit)  # twice each way: dispatch and combine
            sent = 2 * exchange, (2 + self.schedule.sends_again) * exchange
            computed = max(kind.forward for kind in kinds), max(kind.backward for kind in kinds)
            forward, backward = (own + travelling for own, travelling in zip(computed, sent, strict=True))
            woven = max(sum(computed), sum(sent), backward)
            self._units[unit] = UnitCost(
                forward,
                backward,
                woven if self.schedule.passes == "woven" else forward + backward,
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

    def edge_parameters(self, first: bool, last: bool) -> int:
        """Embedding and dense layers on the first stage; final norm and head on the last."""
        model = self.cost.model
        embedding = model.vocab_size * model.hidden_size
        dense = model.dense_layers * model.dense_layer_parameters
        return first * (embedding + dense) + last * (model.edge_parameters - embedding)

    def most_layers(self, unit: Unit, in_flight: int, first: bool, last: bool) -> int:
        """Layers that every device of a unit holds with `in_flight` micro-batches between forward and backward."""
        types = {self.cost.devices[rank].type for rank in unit}
        return min([self._most_on(name, in_flight, first, last) for name in types])

    def _most_on(self, name: str, in_flight: int, first: bool, last: bool) -> int:
        """Memory is linear in the layers, and in the micro-batches of each; woven, nearly so."""
        key = name, in_flight, first, last
        if key not in self._most:
            (one, more), (two, most) = self._edges(name, first, last)
            one, two = one + (in_flight - 2) * (more - one), two + (in_flight - 2) * (most - two)
            room = self.cost.types[name].memory_bytes * self.cost.train.memory_headroom
            fitting = 1 + floor((room - one) / (two - one)) if room >= one else 0
            fitting = min(fitting, self.cost.model.layers - 1)  # a pipeline has two stages at least
            while (
                self.schedule.passes == "woven"
                and fitting
                and self._needed(name, in_flight, first, last, fitting) > room
            ):
                fitting -= 1
            self._most[key] = fitting
        return self._most[key]

    def _edges(self, name: str, first: bool, last: bool) -> list[list[int]]:
        """Bytes of a device that holds one layer and two layers, with two micro-batches and three of each."""
        key = name, first, last
        if key not in self._bytes:
            self._bytes[key] = [[self._needed(name, n, first, last, layers) for n in (2, 3)] for layers in (1, 2)]
        return self._bytes[key]

    def _needed(self, name: str, in_flight: int, first: bool, last: bool, layers: int) -> int:
        """Bytes of a device that holds so many layers."""
        model, woven = self.cost.model, self.schedule.passes == "woven"
        begin = 0 if first else model.layers - layers if last else 1
        span = Span(0, begin, begin + layers, (), (), 0 if last else 1, self.schedule, last)
        return self.cost.memory(
            self.cost.types[name],
            sequences=self.sequences // self.width,
            sequences_per_micro_batch=self.sequences,
            schedule=self.schedule,
            hosted=[self.hosted] * layers,
            replicated=[],
            attending=self.width,
            stepped=self._stepped(layers, first, last),
            windows=in_flight - 1 + 1 / layers if woven else in_flight,  # as windows_alive
            span=span,
        ).total_bytes

    def _stepped(self, layers: int, first: bool, last: bool) -> float:
        """Parameters that a device updates: of the dense part its share, where that is shared out."""
        dense, experts = self._dense(layers, first, last), layers * self.hosted * self.cost.model.expert_parameters
        return (
            self.cost.dense_share(self.schedule, self.width) * dense + self.cost.state_share(self.schedule, 1) * experts
        )

    def _dense(self, layers: int, first: bool, last: bool) -> int:
        """Parameters of the dense part of a stage."""
        return layers * self.cost.model.attention_layer_parameters + self.edge_parameters(first, last)

    def update_seconds(self, pipelines: Sequence[Sequence[tuple[Unit, int]]], *, hidden: bool = True) -> float:
        """What of the all-reduce follows the last backward, then the slowest optimizer step, and, where states are
        shared out, the new weights of the first layer, for which the next iteration waits. `hidden`: as _rings.

        Pipelines: (unit, layers) of every stage.
        """
        steps = [0.0]
        for pipeline in pipelines:
            for stage, (unit, layers) in enumerate(pipeline):
                first, last = stage == 0, stage == len(pipeline) - 1
                stepped = self._stepped(layers, first, last)
                steps += [self.cost.optimizer_seconds(self.cost.of(rank), stepped) for rank in unit]
        units = [pipeline[0][0] for pipeline in pipelines] if self.schedule.shares_states else []
        gathers = [self.cost.gather_seconds(unit, 0) for unit in units]
        return all_reduce_seconds(self.cost, self._rings(pipelines, hidden)) + max(gathers, default=0.0) + max(steps)

    def _rings(self, pipelines: Sequence[Sequence[tuple[Unit, int]]], hidden: bool) -> Iterator[tuple[Unit, int]]:
        """(ranks, gradient bytes): the dense part over all devices that hold it, experts over those of equal place.

        `hidden`: of layer 0 and what comes before it only, whose backward comes last. All other gradients travel during
        backward, as those of a layout do, and in the rival's favour hold up none of its messages. Else of all layers,
        as there is one micro-batch's backward only to hide them, and stage by stage, wherever pipelines are cut.
        """
        gradient, model = STATE_BYTES[self.cost.train.precision][1], self.cost.model
        for stage, parts in enumerate(zip(*pipelines, strict=True)):
            if hidden and stage:
                return
            units, layers = [unit for unit, _ in parts], 1 if hidden else max(count for _, count in parts)
            dense = self._dense(layers, stage == 0, stage == len(pipelines[0]) - 1 and not hidden)
            yield _together(units), dense * gradient
            experts = layers * self.hosted * model.expert_parameters * gradient
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
