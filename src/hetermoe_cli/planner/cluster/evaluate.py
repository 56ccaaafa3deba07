"""Evaluate one choice of a group: placements timed by the class-level task graph; chosen ones are replayed later."""

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.arrays import FloatArray, IntArray
from hetermoe_cli.planner.cluster.choices import Option
from hetermoe_cli.planner.cluster.parts import Kernels, Part
from hetermoe_cli.planner.cluster.placements import mixture, placements, rows
from hetermoe_cli.planner.instance.choice import Choice, DeviceClass, group
from hetermoe_cli.planner.instance.counts import Counts, counts_of, fits, seconds, step_seconds
from hetermoe_cli.planner.instance.deal import deal
from hetermoe_cli.planner.instance.graph import TaskGraph, task_graph
from hetermoe_cli.planner.instance.ports import Port
from hetermoe_cli.planner.instance.rates import Rates
from hetermoe_cli.spec.layout import Layout

FULL = 12  # layers that are timed in full
FEW = (3, 6)  # layers that a row is timed over


class GroupRates(Rates):
    """Rates whose ports are those of one device of each class: the others are alike."""

    def __init__(
        self, cost: CostModel, part: Part, kernels: Kernels, choice: Choice, classes: list[DeviceClass]
    ) -> None:
        self.cost, self.choice, self.classes = cost, choice, tuple(classes)
        self.layers, self.experts = cost.model.layers, cost.model.experts
        self.class_of = {rank: index for index, c in enumerate(self.classes) for rank in c.ranks}
        attending, total = sum(c.count for c in classes if c.attends), choice.micro_batch_sequences
        self.of = [
            kernels.rates(part.kind_of[c.ranks[0]], c.sequences, choice.schedule, total, attending, part.groups)
            for c in classes
        ]

    @property
    def ring(self) -> dict[int, bool]:
        """Groups synchronise after all of them have computed."""
        return {}

    @cached_property
    def _port_pairs(self) -> list[tuple[Port | None, Port | None]]:
        network = self.cost.network
        senders = np.array(self.choice.sequences) > 0
        nics = 1 + max(device.nic for device in self.cost.devices)
        links = sorted({link for c in self.classes for link in (self.cost.devices[c.ranks[0]].nic, nics + c.ranks[0])})

        def messages(ports: IntArray, port: int) -> list[tuple[int, int]]:
            sources, targets = np.nonzero((ports == port) & senders[:, None])
            return list(zip(sources.tolist(), targets.tolist(), strict=True))

        return [
            (
                self._port(2 * link, messages(network.out_port, 2 * link)),
                self._port(2 * link + 1, messages(network.in_port, 2 * link + 1)),
            )
            for link in links
        ]


@dataclass(frozen=True)
class Evaluated:
    """A placement of one choice, with the class-level seconds of its compute and transfers, and of its optimizer."""

    choice: Choice
    classes: list[DeviceClass]
    counts: Counts
    compute: float
    optimizer: float

    def layout(self) -> Layout:
        """On the group's local ranks."""
        return self.choice.layout(deal(self.classes, self.counts, len(self.choice.sequences)))

    @property
    def attending(self) -> list[int]:
        """Local ranks that attend."""
        return sorted(rank for c in self.classes if c.attends for rank in c.ranks)

    @property
    def hosted(self) -> FloatArray:
        """[classes] experts of all layers that a device hosts, on average."""
        sizes = np.array([c.count for c in self.classes])
        result: FloatArray = self.counts.totals(sizes.tolist()).sum(-2) / sizes
        return result

    @property
    def replicated(self) -> int:
        """Copies of all layers on each attending device."""
        return int(self.counts.replicated.sum())


def evaluate(part: Part, kernels: Kernels, option: Option) -> Evaluated | None:
    """The best of some placements; None where none fits."""
    choice = Choice(option.schedule, sequences_per_rank(part, option))
    classes = group(part.any_cost.devices, choice.sequences)
    rates = GroupRates(part.any_cost, part, kernels, choice, classes)
    found = _in_full(rates) if rates.layers <= FULL else _by_rows(rates)
    if found is None:
        return None
    table, time = found
    counts = counts_of(rates, table)
    return Evaluated(choice, classes, counts, time, float(step_seconds(rates, counts)))


def _in_full(rates: GroupRates) -> tuple[IntArray, float] | None:
    """[layers, classes + 1] the best levelled placement, all layers timed."""
    tables = placements(rates)
    counts = counts_of(rates, tables)
    tables = tables[fits(rates, counts)]
    if not len(tables):
        return None
    times = timed(rates, tables)
    return tables[int(times.argmin())], float(times.min())


def _by_rows(rates: GroupRates) -> tuple[IntArray, float] | None:
    """[layers, classes + 1] the best mixture of rows, and what its layers take if they do not help each other."""
    pool = rows(rates)
    short, long = (timed(rates, np.repeat(pool[:, None], few, axis=1)) for few in FEW)
    each = (long - short) / (FEW[1] - FEW[0])
    table = mixture(rates, pool, each)
    if table is None:
        return None
    chosen = [int(np.flatnonzero((pool == row).all(1))[0]) for row in table]
    ends = short - FEW[0] * each
    return table, float(each[chosen].sum() + ends[chosen].max())


def sequences_per_rank(part: Part, option: Option) -> tuple[int, ...]:
    """Each kind's numbers over its ranks in turn over the nodes, so that nodes stay alike."""
    devices = part.any_cost.devices
    wanted: dict[int, list[int]] = defaultdict(list)
    for share in option.shares:
        wanted[share.kind] += [share.sequences] * share.devices
    place: dict[int, int] = {}
    first: dict[int, int] = {}
    for device in devices:
        first.setdefault(device.node, device.rank)
        place[device.rank] = device.rank - first[device.node]
    result = [0] * len(devices)
    for kind, numbers in wanted.items():
        ranks = sorted((rank for rank, k in enumerate(part.kind_of) if k == kind), key=lambda rank: (place[rank], rank))
        for rank, number in zip(ranks, numbers, strict=True):
            result[rank] = number
    return tuple(result)


def timed(rates: GroupRates, tables: IntArray) -> FloatArray:
    """[n] seconds of compute and transfers of `tables` [n, layers, classes + 1]."""
    counts = counts_of(rates, tables)
    return seconds(_without_steps(rates), small_graph(rates, tables.shape[1]), counts)


def _without_steps(rates: GroupRates) -> GroupRates:
    """Compute and transfers alone."""
    result = GroupRates.__new__(GroupRates)
    result.__dict__.update(rates.__dict__)
    segments = rates.layers + 1
    result.__dict__ |= {"reduces": [(0.0, 0.0)] * segments, "gathers": [(0.0, 0.0)] * segments}
    result.of = [replace(r, optimizer_base=0.0, optimizer_per_expert=0.0, optimizer_per_copy=0.0) for r in rates.of]
    return result


def small_graph(rates: Rates, layers: int) -> TaskGraph:
    """The task graph with one or two devices in place of each class: tasks and edges are the same."""
    sequences: list[int] = []
    small: list[DeviceClass] = []
    for c in rates.classes:
        ranks = tuple(range(len(sequences), len(sequences) + min(c.count, 2)))
        small.append(DeviceClass(c.type, c.sequences, ranks))
        sequences += [c.sequences] * len(ranks)
    return task_graph(Choice(rates.choice.schedule, tuple(sequences)), small, layers)
