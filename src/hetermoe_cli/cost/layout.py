"""LayoutCost: seconds of every action of one layout under one expert load."""

from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.ports import Matrix, TransferCost
from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.spec.plan import Layout, Memory


class Load(Protocol):
    """Who sends how many rows to which expert."""

    def __call__(self, layer: int, micro_batch: int) -> Matrix:
        """rows [world, experts]: rows of rank r's tokens for expert e (nominal, may be fractional)."""
        ...


def balanced_load(cost: CostModel, layout: Layout) -> Load:
    """Every expert gets the same share of every rank's rows."""
    rows = np.array([cost.rows_per_expert(sequences) for sequences in layout.sequences_per_rank], dtype=np.float64)
    matrix = np.repeat(rows[:, None], cost.model.experts, axis=1)
    return lambda layer, micro_batch: matrix


class RecordedLoad:
    """Counts recorded in a run, [world, layers, micro-batches, experts], scaled to nominal rows."""

    def __init__(self, counts: NDArray[np.integer], scale: float) -> None:
        self._counts, self._scale = counts, scale

    def __call__(self, layer: int, micro_batch: int) -> Matrix:
        scaled: Matrix = self._counts[:, layer, micro_batch, :].astype(np.float64) * self._scale
        return scaled


class LayoutCost:
    """Seconds of compute actions and transfers. With `load` None the router is balanced."""

    def __init__(self, cost: CostModel, layout: Layout, load: Load | None = None) -> None:
        self.cost, self.layout = cost, layout
        self._balanced = load is None
        self._load = load or balanced_load(cost, layout)
        self._cache: dict[tuple[object, ...], float] = {}
        self._transfers: dict[tuple[object, ...], TransferCost] = {}
        self._owner = self._hosts()
        self._ports: dict[tuple[int, bool], tuple[int, ...]] = {}

    def _hosts(self) -> NDArray[np.float64]:
        """[layers, experts, world] one where the rank hosts the expert; replicated experts have no host."""
        layout = self.layout
        owner = np.zeros((layout.layers, layout.experts, layout.world_size))
        for layer, placement in enumerate(layout.placement):
            for rank, experts in enumerate(placement.experts):
                owner[layer, experts, rank] = 1.0
        return owner

    def expert_rows(self, rank: int, layer: int, micro_batch: int) -> list[float]:
        """Rows of each local expert, in the order of layout.local_experts."""
        rows = self._load(layer, micro_batch)
        placement = self.layout.placement[layer]
        hosted: list[float] = rows[:, placement.experts[rank]].sum(axis=0).tolist()
        if not self.layout.sequences_per_rank[rank]:
            return hosted
        return hosted + [float(rows[rank, expert]) for expert in placement.replicated]

    def seconds(self, rank: int, action: Action) -> float:
        """Seconds of a compute action (not S) on `rank`."""
        micro_batch = 0 if self._balanced else action.micro_batch
        key = (rank, action.kind, action.direction, action.layer, micro_batch)
        if key not in self._cache:
            if action.kind is Kind.EXPERT:
                value = self.expert_seconds(rank, action, self.expert_rows(rank, action.layer, micro_batch))
            else:
                value = self._dense_seconds(rank, action)
            self._cache[key] = value
        return self._cache[key]

    def expert_seconds(self, rank: int, action: Action, rows: list[float]) -> float:
        """Seconds of an expert action that received `rows` rows per local expert."""
        curve = self.cost.of(rank).expert
        costs = [curve(count) for count in rows]
        forward = sum(c.forward for c in costs)
        if action.direction is Pass.FORWARD:
            return forward
        return sum(c.backward for c in costs) + (forward if self.layout.schedule.recompute_experts else 0.0)

    def _dense_seconds(self, rank: int, action: Action) -> float:
        device, sequences = self.cost.of(rank), self.layout.sequences_per_rank[rank]
        if action.kind is Kind.OPTIMIZER:
            return self.cost.optimizer_seconds(device, self.parameters(rank))
        if action.kind is Kind.HEAD:
            head = self.cost.head_cost(device, sequences)
            return head.forward + (head.backward if action.direction is Pass.BACKWARD else 0.0)
        attention = device.attention(sequences)
        if action.direction is Pass.FORWARD:
            return attention.forward
        return attention.backward + (attention.forward if self.layout.schedule.recompute_attention else 0.0)

    def transfer(self, action: Action) -> TransferCost:
        """Seconds of a dispatch or combine, and the ports that the layout lets it use.

        The ports do not depend on the rows, so that the order on every port is known before any row is counted.
        """
        micro_batch = 0 if self._balanced else action.micro_batch
        key = (action.layer, micro_batch, action.towards_experts)
        if key not in self._transfers:
            rows = self._load(action.layer, micro_batch) @ self._owner[action.layer]
            sent = (rows if action.towards_experts else rows.T) * self.cost.row_bytes
            seconds = self.cost.network.seconds(sent)
            self._transfers[key] = TransferCost(seconds, self._static_ports(action))
        return self._transfers[key]

    def _static_ports(self, action: Action) -> tuple[int, ...]:
        key = (action.layer, action.towards_experts)
        if key not in self._ports:
            attends = np.array(self.layout.sequences_per_rank) > 0
            hosts = self._owner[action.layer].any(axis=0)
            pairs = np.outer(attends, hosts)
            self._ports[key] = self.cost.network.ports(pairs if action.towards_experts else pairs.T)
        return self._ports[key]

    @cached_property
    def synchronise_seconds(self) -> float:
        """All-reduce of dense and replicated gradients over the attending ranks."""
        replicated = sum(len(placement.replicated) for placement in self.layout.placement)
        size = self.cost.dense_gradient_bytes + replicated * self.cost.expert_gradient_bytes
        return self.cost.network.all_reduce_seconds(self.layout.attending, size)

    def parameters(self, rank: int) -> int:
        """Parameters that `rank` holds and updates."""
        experts = sum(len(self.layout.local_experts(layer, rank)) for layer in range(self.layout.layers))
        dense = self.cost.model.dense_parameters if self.layout.sequences_per_rank[rank] else 0
        return dense + experts * self.cost.model.expert_parameters

    def memory(self, rank: int) -> Memory:
        """Bytes of `rank` by kind."""
        layout = self.layout
        return self.cost.memory(
            self.cost.of(rank),
            sequences=layout.sequences_per_rank[rank],
            sequences_per_micro_batch=layout.sequences_per_micro_batch,
            schedule=layout.schedule,
            hosted=[len(placement.experts[rank]) for placement in layout.placement],
            replicated=[len(placement.replicated) for placement in layout.placement],
        )
