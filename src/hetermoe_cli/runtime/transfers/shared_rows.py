"""Dispatch once per device: a token's row goes once to every rank that hosts some of its experts, and comes back once,
summed there (as DeepSeek's DeepEP does it between nodes).

Fewer rows travel, the more experts a rank hosts; in return hosts copy every row once for each of its experts, which
they need not where rows of one source come sorted by expert. A row's tail has k combine weights and k experts, as
numbered at the rank that it goes to: each choice has its place, so that the sum over ranks of what comes back is the
gradient of all weights. Numbers count from 1 (0: another rank's), in digits that every precision holds.
"""

from bisect import bisect_right
from collections.abc import Mapping

import torch
from torch import Tensor

from hetermoe_cli.runtime.transfers.dispatcher import CPU, Arrivals, LayerMap, Routing, Sizes
from hetermoe_cli.runtime.transfers.slots import Slots
from hetermoe_cli.spec.layout import Layout

_DIGIT = 256  # bf16 holds integers up to here


class DeviceMap(LayerMap):
    """Static facts of one layer on one rank, where rows go once per rank."""

    def __init__(self, layout: Layout, layer: int, rank: int, top_k: int, device: torch.device = CPU) -> None:
        super().__init__(layout, layer, rank, device)
        self.top_k = top_k
        self.digits = 1 if layout.experts <= _DIGIT else 2
        targets = [bisect_right(self.bounds, key) - 1 for key in self.keys]
        local = [key - self.bounds[target] for key, target in zip(self.keys, targets, strict=True)]
        self._target = torch.tensor([*targets[:-1], self.world_size], dtype=torch.int32, device=device)
        self._number = torch.tensor([*(1 + place for place in local[:-1]), 0], dtype=torch.int32, device=device)
        self._before = torch.ones(top_k, top_k, dtype=torch.bool, device=device).tril(-1)

    @property
    def tail(self) -> int:
        """Weights, and digits of experts."""
        return (1 + self.digits) * self.top_k

    def route(self, experts: Tensor) -> "DeviceRouting":
        """Plan the sending: of a token's choices on one rank the first stands for all."""
        targets, numbers = self._target[experts], self._number[experts]
        repeats = ((targets[:, :, None] == targets[:, None, :]) & self._before).any(dim=-1)
        ranks = targets.masked_fill(repeats, self.world_size).flatten()
        by_expert = _counts(self._key[experts.flatten()], len(self.keys))[: self.bounds[-1]]
        rows = torch.cat([by_expert, _counts(ranks.long(), self.world_size + 1)[:-1]])
        return DeviceRouting(ranks.sort(stable=True).indices, targets, numbers, rows, self)

    def arrivals(self, told_by_source: Mapping[int, list[int]], device: torch.device = CPU) -> "DeviceArrivals":
        """Plan the grouping; the rows themselves tell which experts they are for."""
        table = self.table({source: told[:-1] for source, told in told_by_source.items()})
        sizes = [told_by_source.get(source, [0])[-1] for source in range(self.world_size)]
        return DeviceArrivals([sum(column) for column in zip(*table, strict=True)], sizes, self.top_k, self.digits)


def _counts(values: Tensor, kinds: int) -> Tensor:
    """[kinds] how often each number comes; unlike bincount without waiting for the device."""
    return values.new_zeros(kinds).scatter_add_(0, values, torch.ones_like(values))


class DeviceRouting(Routing):
    """Sending side: a slot stands for all choices of its token that go where it goes."""

    def __init__(self, order: Tensor, targets: Tensor, numbers: Tensor, rows: Tensor, layer_map: DeviceMap) -> None:
        """targets and numbers [T, k]: every choice's rank and number there; rows: how many choices go to each expert,
        in sending order, then how many rows to each rank."""
        super().__init__(order, targets.shape[1], rows, layer_map)
        self._targets, self._numbers, self._digits = targets, numbers, layer_map.digits
        if order.device.type == "cpu":
            self.most = sum(self.sizes)  # elsewhere the host does not know it yet

    def _sizes_of(self, rows: list[int]) -> Sizes:
        return super()._sizes_of(rows)._replace(per_target=rows[-self._map.world_size :])

    def told(self, target: int) -> list[int]:
        """Rows for every expert there, and all rows."""
        return [*self.counts[target], self.sizes[target]]

    def told_vector(self, target: int, device: torch.device) -> Tensor:
        """The same to another rank."""
        vector, bounds = self._vector(device), self._map.bounds
        place = bounds[-1] + target
        return torch.cat([vector[bounds[target] : bounds[target + 1]], vector[place : place + 1]])

    def gather_weighted(self, rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        """rows [T, H] and weights [T, k] -> [most, H + tail] in sending order, in `out`."""
        width, k = rows.shape[1], self.top_k
        tokens = self.tokens()
        torch.index_select(rows, 0, tokens, out=out[:, :width])
        elsewhere = self._targets[tokens] != self._targets.flatten()[self.order[: self.most], None]
        numbers = self._numbers[tokens].masked_fill_(elsewhere, 0)
        digits = [numbers] if self._digits == 1 else [numbers % _DIGIT, numbers // _DIGIT]
        for place, part in enumerate([weights[tokens].masked_fill_(elsewhere, 0), *digits]):
            out[:, width + place * k : width + (place + 1) * k] = part
        return out

    def gradients(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """[M, H + tail] in sending order -> gradients of rows [T, H] and of weights [T, k]."""
        summed = self.summed(rows)
        return summed[:, :width], summed[:, width : width + self.top_k]


class DeviceArrivals(Arrivals):
    """Receiving side: rows come source by source, each for one or several experts here.

    `slots`: the choices here of the rows that came, by expert; known once these are here, and kept for backward.
    """

    slots: Slots

    def __init__(self, counts: list[int], sizes: list[int], top_k: int, digits: int = 1) -> None:
        super().__init__(None, counts, sizes)
        self._top_k, self._digits, self._sorted = top_k, digits, False

    def take(self) -> "DeviceArrivals":
        """Use it on the current stream, the one that sorts."""
        return self

    def group_weighted(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """[D, H + tail] by source -> rows [M, H] and weights [M] by expert."""
        k = self._top_k
        if not self._sorted:
            numbers = rows[:, width + k : width + 2 * k].flatten().int()
            if self._digits > 1:
                numbers += _DIGIT * rows[:, width + 2 * k : width + 3 * k].flatten().int()
            order = numbers.masked_fill_(numbers == 0, 1 + len(self.counts)).sort(stable=True).indices
            self.slots, self._sorted = Slots(order, k, sum(self.counts)), True
        weights = rows[:, width : width + k].flatten().index_select(0, self.slots.order[: self.slots.most])
        return self.group(rows[:, :width]), weights

    def group(self, rows: Tensor) -> Tensor:
        """[D, H] by source -> [M, H] by expert."""
        return self.slots.gather(rows)

    def ungroup(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """[M, H] by expert -> [D, H] by source, summed over a row's experts, in `out` if that is given."""
        summed = self.slots.summed(rows)
        return summed if out is None else out.copy_(summed)

    def ungroup_weighted(self, rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        """[M, H] and [M] by expert -> [D, H + tail] by source, in `out`."""
        width, slots = rows.shape[1], self.slots
        self.ungroup(rows, out[:, :width])
        by_choice = weights.new_zeros(len(slots.order))
        by_choice[slots.order[: slots.most]] = weights
        out[:, width : width + slots.top_k] = by_choice.view(-1, slots.top_k)
        return out


def layer_map(layout: Layout, layer: int, rank: int, top_k: int, device: torch.device = CPU) -> LayerMap:
    """As the layout's dispatch wants it."""
    if layout.schedule.dispatch == "per_device":
        return DeviceMap(layout, layer, rank, top_k, device)
    return LayerMap(layout, layer, rank, device)
