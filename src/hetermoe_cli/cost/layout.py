"""LayoutCost: seconds of every action of one layout under one expert load."""

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import numpy as np

from hetermoe_cli.cost.crossing import Crossing
from hetermoe_cli.cost.layout_memory import LayoutMemory
from hetermoe_cli.cost.load import AssumedLoad, CountedLoad, Load, balanced_load
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.ports import Matrix, Ranks, TransferCost
from hetermoe_cli.cost.shared_rows import once_per_device
from hetermoe_cli.schedule.action import Action, Kind, Pass, trips
from hetermoe_cli.schedule.schedule import is_whole
from hetermoe_cli.spec.layout import LayerPlacement, Layout, Span


class _Hosts(NamedTuple):
    """The hosted experts of a layer, host by host, and the rank that hosts each."""

    experts: Ranks
    ranks: Ranks


class LayoutCost(LayoutMemory):
    """Seconds of compute actions and transfers, under the inputs' expert load (balanced without one) unless `load`.

    `copies`: groups that train the model side by side (schedule.lower). `sharers` as of LayoutMemory.
    `synchronise_seconds`: from a rank's last gradient until all may step, where others are slower.
    """

    copies = 1
    synchronise_seconds = 0.0

    def __init__(self, cost: CostModel, layout: Layout, load: Load | None = None) -> None:
        super().__init__(cost, layout)
        self._alike = load is None and not layout.shifts  # all micro-batches
        self._balanced = load is None and cost.shares is None
        assumed = balanced_load(cost, layout) if cost.shares is None else AssumedLoad(cost.shares, cost, layout)
        self._load = load or assumed
        self._span = [span for span in layout.spans for _ in span.layers]  # of every layer
        self._hosts = [_hosts(placement) for placement in layout.placement]
        replicated = [len(placement.replicated) for placement in layout.placement]
        parts = zip(self._hosts, self._span, replicated, strict=True)
        self._shapes = [((h.ranks.tobytes(), span.number), count) for h, span, count in parts]
        self._rows: tuple[object, Matrix] | None = None  # the last load that was asked for
        self._row_sums: dict[object, list[float]] = {}
        self._dense: dict[tuple[object, ...], float] = {}
        self._by_rank: dict[object, Matrix] = {}
        self._transfers: dict[tuple[int, int, bool], TransferCost] = {}
        self._busy: dict[object, Matrix] = {}
        self._collectives: dict[tuple[Kind, int, bool], TransferCost] = {}
        self._ports: dict[tuple[object, int, bool], tuple[int, ...]] = {}
        self._rings: dict[tuple[int, ...], tuple[int, ...]] = {}  # by holders
        self._crossings: dict[tuple[int, int], Crossing] = {}

    def expert_rows(self, rank: int, layer: int, micro_batch: int) -> list[float]:
        """Rows of each local expert, in the order of layout.local_experts."""
        placement, key = self.layout.placement[layer], self._key(layer, micro_batch)
        if key not in self._row_sums:
            self._row_sums[key] = self._rows_of(layer, micro_batch).sum(axis=0).tolist()
        sums = self._row_sums[key]
        rows = [sums[expert] for expert in placement.experts[rank]]
        if placement.replicated and self.layout.attends(rank, layer):
            rows += self._rows_of(layer, micro_batch)[rank, placement.replicated].tolist()
        return rows

    def _key(self, layer: int, micro_batch: int) -> tuple[int, ...]:
        """Equal where loads are."""
        if self._balanced:
            return (self._span[layer].number, self._shift(micro_batch))
        return (layer,) if self._alike else (layer, micro_batch)

    def _shift(self, micro_batch: int) -> int:
        """Equal where the same ranks attend."""
        return micro_batch if self.layout.shifts else 0

    def _rows_of(self, layer: int, micro_batch: int) -> Matrix:
        """The load, kept until another one is asked for."""
        key = self._key(layer, micro_batch)
        if self._rows is None or self._rows[0] != key:
            self._rows = key, self._load(layer, micro_batch)
        return self._rows[1]

    def _shape(self, layer: int, micro_batch: int) -> object:
        """Equal where costs are: under a balanced router, layers of a stage whose ranks hold as many experts each."""
        if self._balanced:
            return self._shapes[layer], self._shift(micro_batch)
        return self._key(layer, micro_batch)

    def seconds(self, rank: int, action: Action) -> float:
        """Seconds of a compute action (not S) on `rank`."""
        if action.kind is Kind.EXPERT:
            return self.expert_seconds(rank, action, self.expert_rows(rank, action.layer, action.micro_batch))
        if action.kind is Kind.OPTIMIZER:
            return self.cost.optimizer_seconds(self.cost.of(rank), self.parameters(rank))
        head = action.kind is Kind.HEAD
        sequences = self.layout.head_sequences(rank) if head else self.layout.sequences_per_rank[rank]
        span = self._span_of(action)
        place = _place(action), action.layer == span.first  # dense layers; a stage that has none before it
        key = (self.cost.devices[rank].type, sequences, action.kind, action.direction, place, span.schedule.recompute)
        if key not in self._dense:
            self._dense[key] = self._dense_seconds(rank, action)
        return self._dense[key]

    def seconds_by_rank(self, action: Action) -> Matrix:
        """Seconds [world] of a compute action (not S) on every rank that has a part in it."""
        shape = self._shape(action.layer, action.micro_batch) if action.kind is Kind.EXPERT else None
        span = self._span_of(action)
        key = action.kind, action.direction, shape, _place(action), span.number, action.layer == span.first
        if key not in self._by_rank:
            hosts = action.kind is Kind.EXPERT
            self._by_rank[key] = self._expert_seconds_by_rank(action) if hosts else self._other_seconds_by_rank(action)
        return self._by_rank[key]

    def _other_seconds_by_rank(self, action: Action) -> Matrix:
        result = np.zeros(self.layout.world_size)
        for rank in self._working(action):
            result[rank] = self.seconds(rank, action)
        return result

    def _working(self, action: Action) -> Iterable[int]:
        """Who has a part in a task that is not of experts."""
        if action.kind is Kind.OPTIMIZER:
            return range(self.layout.world_size)
        return self.layout.head_ranks if action.kind is Kind.HEAD else self._span_of(action).attending

    def _expert_seconds_by_rank(self, action: Action) -> Matrix:
        """As `expert_seconds` of every rank: hosted experts have all ranks' rows, copies those of their own rank."""
        layer, (experts, ranks), span = action.layer, self._hosts[action.layer], self._span_of(action)
        load, copies = self._rows_of(layer, action.micro_batch), self.layout.placement[layer].replicated
        rows = load.sum(axis=0)[experts]
        if copies:
            ranks = np.concatenate([ranks, np.repeat(span.attending, len(copies))])
            rows = np.concatenate([rows, load[np.ix_(span.attending, copies)].ravel()])
        there, back = np.zeros(self.layout.world_size), np.zeros(self.layout.world_size)
        for device, members in self.cost.members.items():
            own = members[ranks]
            forward, backward = self.cost.types[device].expert.seconds(rows[own])
            np.add.at(there, ranks[own], forward)
            np.add.at(back, ranks[own], backward)
        if action.direction is Pass.FORWARD:
            return there
        return back + there if span.schedule.recompute_experts else back

    def _span_of(self, action: Action) -> Span:
        """The pipeline stage that a task of a layer, or of its end, belongs to."""
        layer = action.layer - (action.kind is Kind.PASS)
        last = action.kind is Kind.HEAD or layer >= len(self._span)  # a planner's probe may ask for any layer
        return self._span[-1] if last else self._span[layer]

    def expert_seconds(self, rank: int, action: Action, rows: list[float]) -> float:
        """Seconds of an expert action that received `rows` rows per local expert."""
        device = self.cost.of(rank)
        costs = [device.expert(count) for count in rows]
        forward = sum(c.forward for c in costs)
        if action.direction is Pass.FORWARD:
            return forward
        again = self._span_of(action).schedule.recompute_experts
        return sum(c.backward for c in costs) + (forward if again else 0.0)

    def _dense_seconds(self, rank: int, action: Action) -> float:
        device, sequences = self.cost.of(rank), self.layout.sequences_per_rank[rank]
        span, backward = self._span_of(action), action.direction is Pass.BACKWARD
        schedule, head = span.schedule, action.kind is Kind.HEAD
        # where rows are sent again, the stage of the layer before runs again with a layer's backward, the last one's
        # with the head, or where gradients come back from the next pipeline stage or from ranks of the head
        before = self.cost.model.layers if head else action.layer
        again = schedule.sends_again and backward and (not head or span.has_head)
        sent = self.cost.attention_cost(device, sequences, before - 1).forward if again else 0.0
        if action.kind is Kind.PASS:  # its combine is in the profiled seconds of what follows
            return sent
        if head:
            cost = self.cost.head_cost(device, self.layout.head_sequences(rank))
            return cost.forward + backward * cost.backward + sent
        attention = self.cost.attention_cost(device, sequences, action.layer)
        if not backward:
            return attention.forward
        if schedule.sends_again:
            return attention.backward + (action.layer > span.first) * sent
        return attention.backward + schedule.recompute_attention * attention.forward

    def transfer(self, action: Action) -> TransferCost:
        """Seconds of a transfer, and the ports that the layout lets it use.

        The ports do not depend on the rows, so that the order on every port is known before any row is counted.
        """
        if action.is_collective:
            return self.collective(action.kind, action.layer, whole=is_whole(action, self.layout.micro_batches))
        if action.kind is Kind.CROSS:
            crossing = self._crossing(action)
            return TransferCost(float(crossing.busy.max()), crossing.ports_of(action.direction))
        layer, micro_batch = action.layer, 0 if self._alike else action.micro_batch
        key = (layer, micro_batch, action.towards_experts)
        if key not in self._transfers:
            ports = self._static_ports(layer, micro_batch, action.towards_experts)
            self._transfers[key] = TransferCost(float(self._port_seconds(layer, micro_batch).max()), ports)
        seconds, ports = self._transfers[key]
        return TransferCost(trips(action, self._span[layer].schedule) * seconds, ports)

    def _crossing(self, action: Action) -> Crossing:
        key = action.layer, self._shift(action.micro_batch)
        if key not in self._crossings:
            self._crossings[key] = Crossing.of(self.cost, self.layout, *key)
        return self._crossings[key]

    def slowest_port(self, action: Action) -> int:
        """The port that decides how long a transfer (no collective) takes; the first of equals."""
        crosses = action.kind is Kind.CROSS
        busy = self._crossing(action).busy if crosses else self._port_seconds(action.layer, action.micro_batch)
        there = action.direction is Pass.FORWARD if crosses else action.towards_experts
        return int((busy.reshape(-1, 2) if there else busy.reshape(-1, 2)[:, ::-1]).argmax())

    def _port_seconds(self, layer: int, micro_batch: int) -> Matrix:
        """[ports] seconds that each is busy with a transfer towards the experts."""
        key = self._shape(layer, micro_batch)
        if key not in self._busy:
            rows, targets = self._messages(layer, micro_batch)
            self._busy[key] = self.cost.network.busy(rows * self.cost.row_bytes, targets)
        return self._busy[key]

    def _messages(self, layer: int, micro_batch: int) -> tuple[Matrix, Ranks]:
        """rows [world, messages] of a dispatch, and the rank that each message goes to."""
        hosts, rows = self._hosts[layer], self._rows_of(layer, micro_batch)
        if self.layout.schedule.dispatch == "per_expert":
            return rows[:, hosts.experts], hosts.ranks
        if isinstance(self._load, CountedLoad):
            return self._load.by_rank(layer, micro_batch), np.arange(self.layout.world_size)
        return once_per_device(rows, *hosts, self.cost.model.top_k)

    def _static_ports(self, layer: int, micro_batch: int, towards_experts: bool) -> tuple[int, ...]:
        key = self._shapes[layer][0], self._shift(micro_batch), towards_experts
        if key not in self._ports:
            pair = np.array(self.layout.crew(layer, micro_batch)), np.unique(self._hosts[layer].ranks)
            self._ports[key] = self.cost.network.ports(*(pair if towards_experts else pair[::-1]))
        return self._ports[key]

    def collective(self, kind: Kind, layer: int, *, whole: bool = True) -> TransferCost:
        """What attending ranks sum (R) or gather (G) of a layer; model.layers: of the head. `whole`: with replicated
        experts (`is_whole`)."""
        key = kind, layer, whole
        if key not in self._collectives:
            layout, attending = self.layout, self.layout.attending_at(layer)
            copies = len(layout.placement[layer].replicated) if whole and layer < layout.layers else 0
            if kind is Kind.GATHER:
                seconds = self.cost.gather_seconds(attending, layer, copies)
            else:
                seconds = self.cost.reduce_seconds(layout.schedule, attending, layer, copies)
            self._collectives[key] = TransferCost(seconds, self._ring_ports(attending))
        return self._collectives[key]

    def _ring_ports(self, holders: tuple[int, ...]) -> tuple[int, ...]:
        if holders not in self._rings:
            self._rings[holders] = self.cost.network.ring_ports(holders)
        return self._rings[holders]


def _place(action: Action) -> int:
    """Layers above the second cost the same: the first has the dense layers, which may run again with the second."""
    return min(action.layer, 2)


def _hosts(placement: LayerPlacement) -> _Hosts:
    counts = [len(experts) for experts in placement.experts]
    experts = np.fromiter(chain.from_iterable(placement.experts), np.intp, sum(counts))
    return _Hosts(experts, np.repeat(np.arange(len(counts)), counts))
