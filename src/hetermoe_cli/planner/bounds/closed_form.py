"""Closed-form lower bounds on the iteration time of many choices at once.

All hold for every device-level placement, with experts as divisible work:
stream   a device's compute (attention, head, its experts, its copies), what follows it and its optimizer step; a device
         that does not attend also waits for the first attention and dispatch and for the last gradients and attention;
path     one micro-batch of each window through every layer forward and backward, by one attending device and the
         experts of a host, with the heads of the window's micro-batches between;
lane     the transfers that a device receives follow each other; so do those that an attending device sends, and those
         through the NIC of a node;
memory   experts that a device can hold.
For a given time each of them limits the experts of a device; the bound is the least time at which all experts of all
layers find a place (bisection). Source of the terms: the edges of the task graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetermoe_cli.cost.model import CostModel, scattered
from hetermoe_cli.planner.arrays import BoolArray, FloatArray
from hetermoe_cli.planner.instance.device_rates import ClassRates, device_rates
from hetermoe_cli.spec.cluster import Device, Link
from hetermoe_cli.spec.schedule_choice import ScheduleChoice

TINY = 1e-30  # seconds; instead of dividing by zero
STEPS = 24  # bisection steps: 2^-24 of the first interval


@dataclass(frozen=True)
class Slots:
    """Choices of one schedule: `sequences` and `devices` [choices, slots], `kind` [slots].

    A slot is a number of devices of one kind that attend to the same number of sequences.
    """

    sequences: NDArray[np.int64]
    devices: NDArray[np.int64]
    kind: NDArray[np.int64]


class Bounder:
    """Bounds for all choices of one schedule and micro-batch size."""

    def __init__(self, cost: CostModel, kinds: Sequence[Sequence[int]], schedule: ScheduleChoice, total: int) -> None:
        self.cost, self.kinds, self.schedule, self.total = cost, kinds, schedule, total
        self.layers, self.experts, self.count = cost.model.layers, cost.model.experts, schedule.micro_batches
        self._rates: dict[tuple[int, int], ClassRates] = {}

    def rates(self, kind: int, sequences: int) -> ClassRates:
        """Rates of a device of `kind`."""
        key = (kind, sequences)
        if key not in self._rates:
            rank = self.kinds[kind][0]
            self._rates[key] = device_rates(self.cost, rank, sequences, self.schedule, self.total)
        return self._rates[key]

    def attention_load(self, kind: int, sequences: int) -> float:
        """Compute seconds of an attending device without experts."""
        r = self.rates(kind, sequences)
        return self.count * r.attending(self.layers) + r.optimizer_base

    def fits(self, kind: int, sequences: int) -> bool:
        """Whether a device holds its part apart from experts."""
        return self.rates(kind, sequences).fits

    def ceiling(self) -> float:
        """More than any layout takes: everything on the slowest device, one after another, without end of transfers."""
        worst = max(
            self.attention_load(kind, self.total)
            + self.count * self.layers * self.experts * sum(self.rates(kind, 0).hosted)
            for kind in range(len(self.kinds))
        )
        return 100 * worst

    def bounds(self, slots: Slots, most: float) -> FloatArray:
        """[choices] lower bound; infinite where it is above `most`."""
        result = np.full(len(slots.sequences), np.inf)
        possible = np.flatnonzero(_Terms(self, slots).feasible(np.full(len(result), most)))
        if not len(possible):
            return result
        terms = _Terms(self, Slots(slots.sequences[possible], slots.devices[possible], slots.kind))
        low, high = np.zeros(len(possible)), np.full(len(possible), most)
        for _ in range(STEPS):
            middle = (low + high) / 2
            enough = terms.feasible(middle)
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        result[possible] = low
        return result


class _Terms:
    """Coefficients of the choices, [choices, slots] each."""

    def __init__(self, bounder: Bounder, slots: Slots) -> None:
        self.b, self.slots = bounder, slots
        cost, layers, count = bounder.cost, bounder.layers, bounder.count
        used = slots.devices > 0
        self.devices = slots.devices
        self.attends = (slots.sequences > 0) & used
        table = self._table(slots)
        first_attention = np.where(self.attends, table["first"], 0).max(1, keepdims=True)
        last_attention = np.where(self.attends, table["last"], 0).max(1, keepdims=True)
        self.load = np.where(
            self.attends,
            count * (table["stages"] + table["head"]),
            first_attention + last_attention + 2 * table["receive"],
        )
        self.step_base, self.step, self.step_copy = table["step_base"], table["step"], table["step_copy"]
        self.hosted, self.copy = count * table["hosted"], np.where(self.attends, count * table["copy"], 0)
        repeats = count // bounder.schedule.window
        alone = repeats * table["stages"] + count * table["head"]
        self.path = np.where(self.attends, alone, 0).max(1, keepdims=True)
        self.path_each = repeats * (table["hosted"] + 4 * table["receive"])
        self.lane_each = 2 * count * table["receive"]
        self.send_each = 2 * count * np.where(self.attends, table["send"], 0)
        self.alone = table["alone"]  # what memory has left without experts
        self.room, self.room_each, self.room_copy = table["room"], table["room_each"], table["room_copy"]
        self.collectives = self._collectives(cost)
        self.everything = float(layers * bounder.experts)

    def _table(self, slots: Slots) -> dict[str, FloatArray]:
        rows: dict[str, FloatArray] = {}
        for slot, kind in enumerate(slots.kind):
            values = np.unique(slots.sequences[:, slot])
            for value in values:
                where = slots.sequences[:, slot] == value
                for name, number in self._numbers(int(kind), int(value)).items():
                    rows.setdefault(name, np.zeros(slots.sequences.shape))[where, slot] = number
        return rows

    def _numbers(self, kind: int, sequences: int) -> dict[str, float]:
        b, r, cost = self.b, self.b.rates(kind, sequences), self.b.cost
        device = cost.devices[b.kinds[kind][0]]
        alone, bandwidth = self._alone(device), self._bandwidth(device)
        own, everyone = cost.rows_per_expert(sequences), cost.rows_per_expert(b.total)
        return {
            "first": r.stage(0, 0),
            "last": r.stage(0, 1),
            "stages": r.attending(b.layers) - r.head,
            "head": r.head,
            "hosted": sum(r.hosted),
            "copy": sum(r.replicated),
            "receive": (everyone - own) * cost.least_row_bytes / bandwidth,
            "send": own * cost.least_row_bytes / bandwidth if alone else 0.0,
            "step_base": r.optimizer_base,
            "step": r.optimizer_per_expert,
            "step_copy": r.optimizer_per_copy,
            "alone": r.memory_limit - r.memory_base,
            "room": r.memory_limit - r.memory_base - r.memory_if_any,
            "room_each": r.memory_per_hosted + r.memory_per_share / b.layers,
            "room_copy": r.memory_per_replicated + r.memory_per_copy / b.layers,
        }

    def _alone(self, device: Device) -> bool:
        """Whether all of the device's messages leave its node."""
        return sum(other.node == device.node for other in self.b.cost.devices) == 1

    def _bandwidth(self, device: Device) -> float:
        """Bytes a second of all links that the device's messages can take: of one transfer both may carry a part."""
        return sum(link.bandwidth_gigabytes_per_second for link in self._links(device)) * 1e9

    def _links(self, device: Device) -> list[Link]:
        return [device.network] if self._alone(device) else [device.network, device.interconnect]

    def _collectives(self, cost: CostModel) -> FloatArray:
        """Seconds before and after all compute, over the fastest links of who attends: layer 0's gradients, and its
        new weights where states are shared out. Compute may hide all others, and those of copies are of any layer.
        """
        schedule = self.b.schedule
        slowest = np.zeros(self.slots.sequences.shape)
        for slot, kind in enumerate(self.slots.kind):
            device = cost.devices[self.b.kinds[kind][0]]
            slowest[:, slot] = 1 / max(link.ring_bandwidth for link in self._links(device))
        slowest = np.where(self.attends, slowest, 0).max(1)
        members = np.where(self.attends, self.devices, 0).sum(1)
        share = np.where(members > 1, 2 * (members - 1) / np.maximum(members, 1), 0.0) * slowest
        narrowest = min(cost.weight_bytes([device.rank]) for device in cost.devices)
        summed = scattered(schedule) * cost.segment_parameters(0) * cost.gradient_bytes
        gathered = 0.5 * cost.segment_parameters(0) * narrowest * schedule.shares_states
        result: FloatArray = share * (summed + gathered)
        return result

    def feasible(self, time: FloatArray) -> NDArray[np.bool_]:
        """[choices] whether all experts find a place within `time`, for some number of copies."""
        left = time[:, None] - self.collectives[:, None] - self.step_base
        spare = left - self.load
        ok = np.where(self.attends, spare >= 0, True).all(1)
        ok &= np.where(self.attends, self.alone >= 0, True).all(1)
        each = self.hosted + self.step
        limits = [
            (left - self.path) / self.path_each,
            np.where(self.lane_each > 0, time[:, None] / np.where(self.lane_each > 0, self.lane_each, 1), np.inf),
        ]
        cap = np.minimum.reduce([np.broadcast_to(limit, spare.shape) for limit in limits])
        copy_cost = np.where(self.attends, self.copy + self.step_copy, 0)
        most = np.where(
            self.attends, np.minimum(spare / np.maximum(copy_cost, TINY), self.room / self.room_copy), np.inf
        )
        most_copies = np.clip(most.min(1), 0, self.everything)
        breaks = self._breaks(spare, cap * each, copy_cost, most_copies)
        best = np.full(len(time), -np.inf)
        for copies in breaks:
            hosted = np.minimum((spare - copies[:, None] * copy_cost) / each, cap)
            best = np.maximum(best, (self.devices * np.maximum(hosted, 0)).sum(1) + copies)
        ok &= best >= self.everything
        ok &= self._crosses(time, np.maximum(np.minimum(spare / each, cap), 0), most_copies)
        ok &= self._fits(most_copies) & self._sends(time, spare, each, cap, copy_cost, most_copies)
        return ok

    def _breaks(self, spare: FloatArray, used: FloatArray, copy_cost: FloatArray, most: FloatArray) -> list[FloatArray]:
        """Numbers of copies between which the experts that find a place are linear in the copies."""
        points = [np.zeros_like(most), most]
        for slot in range(spare.shape[1]):
            for value in (spare[:, slot] - used[:, slot], spare[:, slot]):
                points.append(np.clip(value / np.maximum(copy_cost[:, slot], TINY), 0, most))
        return points

    def _crosses(self, time: FloatArray, most: FloatArray, copies: FloatArray) -> BoolArray:
        """Whether shared NICs let enough rows through: into the nodes that host, and out of those that attend.

        `most` [choices, slots]: hosted experts of a device without copies. Only of kinds whose nodes they fill, with
        one NIC each; on average over these nodes.
        """
        place, ok = copies.copy(), np.ones(len(time), dtype=bool)
        for kind, ranks in enumerate(self.b.kinds):
            slots = self.slots.kind == kind
            hosted = (self.devices[:, slots] * most[:, slots]).sum(1)
            if nodes := self._filled_nodes(ranks):
                device = self.b.cost.devices[ranks[0]]
                room = time * nodes * device.network.bandwidth_gigabytes_per_second * 1e9 / (2 * self.b.count)
                own, top = self._sequences(slots, len(ranks) // nodes)
                each = self.b.cost.rows_per_expert(1) * self.b.cost.least_row_bytes
                others = np.maximum((self.b.total - top) * each, TINY)
                hosted = np.minimum(hosted, room / others)
                kept = hosted * top / np.maximum(own, 1) + copies
                ok &= (own == 0) | (self.everything - kept <= room / np.maximum(own * each, TINY))
            place += hosted
        result: BoolArray = ok & (place >= self.everything * (1 - 1e-12))
        return result

    def _filled_nodes(self, ranks: Sequence[int]) -> int:
        """Number of nodes that devices of one kind fill, if each has a single NIC; else 0."""
        devices = self.b.cost.devices
        nodes = {devices[rank].node for rank in ranks}
        inside = [device for device in devices if device.node in nodes]
        filled = len(inside) == len(ranks) and len({device.nic for device in inside}) == len(nodes)
        return len(nodes) if filled else 0

    def _sequences(self, slots: BoolArray, devices: int) -> tuple[FloatArray, FloatArray]:
        """[choices] sequences of a kind, and the most that `devices` of its devices attend to."""
        counts, values = self.devices[:, slots], self.slots.sequences[:, slots]
        taken, top = np.zeros(len(counts)), np.zeros(len(counts))
        for slot in range(counts.shape[1]):  # slots of a kind are sorted by falling numbers
            more = np.minimum(counts[:, slot], devices - taken)
            top += more * values[:, slot]
            taken += more
        return (counts * values).sum(1).astype(np.float64), top

    def _fits(self, most_copies: FloatArray) -> NDArray[np.bool_]:
        held = np.full(len(most_copies), -np.inf)
        for copies in (np.zeros_like(most_copies), most_copies):
            used = np.where(self.attends, copies[:, None] * self.room_copy, 0)
            hosted = np.maximum(self.room - used, 0) / self.room_each
            held = np.maximum(held, (self.devices * hosted).sum(1) + copies)
        return held >= self.everything * (1 - 1e-12)

    def _sends(
        self,
        time: FloatArray,
        spare: FloatArray,
        each: FloatArray,
        cap: FloatArray,
        copy_cost: FloatArray,
        most: FloatArray,
    ) -> NDArray[np.bool_]:
        """Rows for experts elsewhere leave one after another."""
        kept = np.full(spare.shape, -np.inf)
        for copies in (np.zeros_like(most), most):
            hosted = np.maximum(np.minimum((spare - copies[:, None] * copy_cost) / each, cap), 0)
            kept = np.maximum(kept, hosted + copies[:, None])
        result: BoolArray = ((self.everything - kept) * self.send_each <= time[:, None]).all(1)
        return result
