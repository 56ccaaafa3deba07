"""Counts: how many experts of every layer each class holds; their time and memory without a solver."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.planner.arrays import FloatArray, IntArray, largest
from hetermoe_cli.planner.instance.graph import Condition, Hosts, Ring, Task, TaskGraph
from hetermoe_cli.planner.instance.ports import Port
from hetermoe_cli.planner.instance.rates import Rates
from hetermoe_cli.schedule.action import Kind, Pass, trips


@dataclass(frozen=True)
class Counts:
    """Placements on class level; leading dimensions are free.

    `hosted` [..., layers, classes]: experts on the device of the class that has most; `spare` [..., layers, classes]:
    devices of the class that have one less; `replicated` [..., layers].
    """

    hosted: IntArray
    spare: IntArray
    replicated: IntArray

    def totals(self, sizes: Sequence[int]) -> IntArray:
        """Experts of a class together, [..., layers, classes], for classes of `sizes` devices."""
        result: IntArray = self.hosted * np.array(sizes) - self.spare
        return result


def from_totals(totals: IntArray, replicated: IntArray, sizes: Sequence[int]) -> Counts:
    """Spread each class's experts over its devices, uneven by at most one."""
    size = np.array(sizes)
    hosted = -(-totals // size)
    return Counts(hosted, hosted * size - totals, replicated)


def counts_of(rates: Rates, table: IntArray) -> Counts:
    """Counts of [..., layers, classes + 1], whose last column counts replicated experts."""
    return from_totals(table[..., :-1], table[..., -1], rates.sizes)


def table_of(rates: Rates, counts: Counts) -> IntArray:
    """The inverse."""
    return np.concatenate([counts.totals(rates.sizes), counts.replicated[..., None]], axis=-1)


def fits(rates: Rates, counts: Counts) -> NDArray[np.bool_]:
    """[...] whether every device holds its share, when remainders rotate over the layers."""
    result = np.ones(counts.replicated.shape[:-1], dtype=bool)
    totals = counts.totals(rates.sizes)
    replicated = counts.replicated.sum(-1)
    for index, (c, r) in enumerate(zip(rates.classes, rates.of, strict=True)):
        hosted = -(-totals[..., index].sum(-1) // c.count)
        copies = replicated if c.attends else 0 * replicated
        used = r.memory_base + hosted * r.memory_per_hosted + copies * r.memory_per_replicated
        used = used + (hosted + copies > 0) * r.memory_if_any
        used = used + (counts.replicated.max(-1) if c.attends else 0) * r.memory_per_copy
        result &= used + counts.hosted[..., index].max(-1) * r.memory_per_share <= r.memory_limit
    return result


def seconds(rates: Rates, graph: TaskGraph, counts: Counts) -> FloatArray:
    """[...] iteration time on class level: never below the simulator's, equal where no class is uneven."""
    hosts = counts.hosted > 0
    transfers = transfer_seconds(rates, counts)
    conditions = {e.condition: _holds(rates, hosts, e.condition) for e in graph.edges if e.condition is not None}
    starts = np.zeros((len(graph.tasks), *counts.replicated.shape[:-1]))
    lengths = [_length(rates, task, counts, transfers) for task in graph.tasks]
    for before, after, condition, between in graph.edges:
        end = starts[before] + lengths[before]
        for task in between:
            end = end + _length(rates, task, counts, transfers)
        starts[after] = np.maximum(starts[after], end if condition is None else end * conditions[condition])
    ends = [starts[node] + lengths[node] for node in (*graph.last, graph.reduced) if node is not None]
    return largest(ends) + step_seconds(rates, counts)


def transfer_seconds(rates: Rates, counts: Counts) -> FloatArray:
    """[..., layers] length of a dispatch or combine."""
    result = np.zeros(counts.replicated.shape)
    for port in rates.ports:
        used = (counts.hosted[..., list(port.users)] > 0).any(-1)
        load = _port_bytes(rates, port, counts)
        result = np.maximum(result, used * (load * port.byte_seconds + port.latency))
    return result


def _port_bytes(rates: Rates, port: Port, counts: Counts) -> FloatArray:
    weights, travelling = np.array(port.bytes_per_expert), rates.cost.travelling
    most, least = travelling(counts.hosted), travelling(counts.hosted - (counts.spare > 0))
    load: FloatArray = most @ np.maximum(weights, 0) + least @ np.minimum(weights, 0)
    if port.source_bytes:  # all that travels
        sizes = np.array(rates.sizes)
        load = load + port.source_bytes * (most * (sizes - counts.spare) + least * counts.spare).sum(-1)
    return load


def _holds(rates: Rates, hosts: NDArray[np.bool_], condition: Condition) -> NDArray[np.bool_]:
    if isinstance(condition, Hosts):
        return hosts[..., condition.layer, condition.device_class]
    if isinstance(condition, Ring):
        return np.asarray(hosts[..., condition.layer, list(rates.ring)].any(-1))
    first, second = condition.first, condition.second
    result = np.zeros(hosts.shape[:-2], dtype=bool)
    for c, d in rates.conflicts:
        result |= hosts[..., first, c] & hosts[..., second, d] | hosts[..., second, c] & hosts[..., first, d]
    return result


def _length(rates: Rates, task: Task, counts: Counts, transfers: FloatArray) -> FloatArray | float:
    number, action = task
    if action.is_collective:
        base, each = rates.collective(action)
        return np.asarray(base + each * counts.replicated[..., action.layer], dtype=np.float64) if each else base
    if action.is_transfer:
        length: FloatArray = trips(action, rates.choice.schedule) * transfers[..., action.layer]
        return length
    r, c, way = rates.of[number], rates.classes[number], int(action.direction is Pass.BACKWARD)
    if action.kind is Kind.HEAD:
        return r.head
    if action.kind is Kind.ATTENTION:
        return r.stage(action.layer, way)
    copies = counts.replicated[..., action.layer] if c.attends else 0
    return counts.hosted[..., action.layer, number] * r.hosted[way] + copies * r.replicated[way]


def step_seconds(rates: Rates, counts: Counts) -> FloatArray:
    """[...] the slowest optimizer step."""
    replicated = counts.replicated.sum(-1)
    totals = counts.totals(rates.sizes).sum(-2)
    steps = [
        r.optimizer_base + r.optimizer_per_expert * -(-totals[..., i] // c.count) + r.optimizer_per_copy * replicated
        for i, (c, r) in enumerate(zip(rates.classes, rates.of, strict=True))
    ]
    result: FloatArray = np.maximum.reduce(steps)
    return result
