"""Who gets which rows: the permutations of dispatch and combine, as plain tensors and sizes.

T = tokens of the rank's micro-batch, k = choices a token, H = hidden size. A token travels once per chosen expert, or
once per device that hosts some of them (shared_rows.py).
What a dispatch carries is a row and a tail: on the way there the choice's combine weight, on the way back its gradient.
Where rows are sent again, they follow the gradients of outputs, with their tails.
Permutations are computed where the rows are; sizes go to the host on their own, and who needs them waits for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hetermoe_cli.model.copies import Fetched, upload, used_here
from hetermoe_cli.runtime.transfers.slots import Slots, inverse
from hetermoe_cli.spec.layout import Layout

CPU = torch.device("cpu")


class LayerMap:
    """Static facts of one layer on one rank: the order in which rows for each expert are sent and computed."""

    def __init__(self, layout: Layout, layer: int, rank: int, device: torch.device = CPU) -> None:
        self.rank, self.world_size = rank, layout.world_size
        self.hosted = list(layout.placement[layer].experts)
        self.replicated = layout.placement[layer].replicated
        self.attends = layout.attends(rank, layer)
        self.local = layout.local_experts(layer, rank)
        self.told = layout.numbers_ahead(layer, rank)
        self._layout, self._layer = layout, layer
        self.bounds = list(accumulate((self.slots(target) for target in range(self.world_size)), initial=0))
        self.keys = self._send_keys(layout.experts)
        self._key = torch.tensor(self.keys, device=device)
        self._marks = torch.arange(self.bounds[-1] + 1, device=device)

    @property
    def tail(self) -> int:
        """Elements that count behind a row of a dispatch."""
        return 1

    def slots(self, target: int) -> int:
        """How many experts this rank's rows can go to on `target`."""
        own = len(self.replicated) if target == self.rank and self.attends else 0
        return len(self.hosted[target]) + own

    def keeps(self, micro_batch: int) -> bool:
        """Whether rows of a micro-batch go from this rank to its own experts, and back."""
        return self.slots(self.rank) > 0 and self.rank in self._layout.crew(self._layer, micro_batch)

    def _send_keys(self, experts: int) -> list[int]:
        """Position of each expert in this rank's sending order: by target rank, then as local there.

        The last one is that of dropped choices: behind all others.
        """
        keys = [experts] * (experts + 1)
        position = 0
        for target in range(self.world_size):
            own = self.replicated if target == self.rank and self.attends else []
            for expert in [*self.hosted[target], *own]:
                keys[expert] = position
                position += 1
        return keys

    def route(self, experts: Tensor) -> "Routing":
        """Plan the sending of every (token, choice); experts [T, k], the number of experts where dropped.

        Nothing here waits for the device.
        """
        keys, order = self._key[experts.flatten()].sort(stable=True)
        rows = torch.searchsorted(keys, self._marks).diff()
        return Routing(order, experts.shape[1], rows, self)

    def arrivals(self, told_by_source: Mapping[int, list[int]], device: torch.device = CPU) -> "Arrivals":
        """Plan the grouping by expert of rows that come source by source."""
        return Arrivals.of(self.table(told_by_source), len(self.local), device)

    def table(self, counts_by_source: Mapping[int, list[int]]) -> list[list[int]]:
        """[source][local expert] rows; what is not told is 0."""
        found = (counts_by_source.get(source, []) for source in range(self.world_size))
        return [counts + [0] * (len(self.local) - len(counts)) for counts in found]


class Sizes(NamedTuple):
    """Rows of one (layer, micro-batch) on the host: [target][local expert there], per target, per expert."""

    counts: list[list[int]]
    per_target: list[int]
    by_expert: list[int]


class Routing(Slots):
    """Sending side of one (layer, micro-batch): its slots, and how many go where."""

    def __init__(self, order: Tensor, top_k: int, rows: Tensor, layer_map: LayerMap) -> None:
        """rows [slots]: how many choices go to each expert, in sending order."""
        super().__init__(order, top_k)
        self._rows, self._map = rows, layer_map
        self._fetched = Fetched(rows)
        self._host: Sizes | None = None

    def _sizes(self) -> Sizes:
        if self._host is None:  # two threads may both work it out
            self._host = self._sizes_of(self._fetched.wait().tolist())
        return self._host

    def _sizes_of(self, rows: list[int]) -> Sizes:
        counts = [rows[low:high] for low, high in pairwise(self._map.bounds)]
        return Sizes(counts, [sum(part) for part in counts], [rows[key] for key in self._map.keys[:-1]])

    @property
    def counts(self) -> list[list[int]]:
        """Rows [target][local expert there]; this and the next two wait for the device if they are not here yet."""
        return self._sizes().counts

    @property
    def sizes(self) -> list[int]:
        """Rows per target rank."""
        return self._sizes().per_target

    @property
    def by_expert(self) -> list[int]:
        """Rows per expert."""
        return self._sizes().by_expert

    @property
    def waited(self) -> float:
        """Seconds that a thread waited for these sizes."""
        return self._fetched.waited

    def told(self, target: int) -> list[int]:
        """What goes ahead of the rows for `target`: how many for each expert there."""
        return self.counts[target]

    def told_vector(self, target: int, device: torch.device) -> Tensor:
        """The same to another rank, int64, on `device`: for the current stream."""
        return self._vector(device)[self._map.bounds[target] : self._map.bounds[target + 1]]

    def _vector(self, device: torch.device) -> Tensor:
        """All that is fetched."""
        return used_here(self._rows) if device.type == self._rows.device.type else self._fetched.wait()

    def gradients(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """[M, H + tail] in sending order -> gradients of rows [T, H] and of weights [T, k]."""
        weights = self.to_tokens(rows[:, width, None]).squeeze(-1)
        return self.summed(rows)[:, :width], weights  # tails are summed too, for nothing: whole rows are faster read


@dataclass
class Arrivals:
    """Receiving side. Rows come source by source, each sorted by local expert; experts compute them grouped.

    `grouping` [M]: arrival positions in computing order, None if that is the order of arrival (one source, or one
    expert); `counts`: rows per local expert; `sizes`: rows per source.
    """

    grouping: Tensor | None
    counts: list[int]
    sizes: list[int]

    @classmethod
    def of(cls, table: list[list[int]], experts: int, device: torch.device = CPU) -> "Arrivals":
        """table[source][local expert] = rows."""
        matrix = np.array(table, dtype=np.int64).reshape(len(table), experts)
        by_expert, flat = matrix.T.ravel(), matrix.ravel()
        arrived = (flat.cumsum() - flat).reshape(matrix.shape).T.ravel()
        shift = (arrived - (by_expert.cumsum() - by_expert))[by_expert > 0]  # of whole blocks (source, expert)
        grouping = None
        if shift.any():
            blocks = upload(torch.from_numpy(np.stack([shift, by_expert[by_expert > 0]])), device)
            rows = int(matrix.sum())
            grouping = torch.arange(rows, device=device) + blocks[0].repeat_interleave(blocks[1], output_size=rows)
        return cls(grouping, matrix.sum(axis=0).tolist(), matrix.sum(axis=1).tolist())

    def take(self) -> "Arrivals":
        """Use it on the current stream."""
        if self.grouping is not None:
            used_here(self.grouping)
        return self

    @property
    def rows(self) -> int:
        """How many come."""
        return sum(self.sizes)

    def group_weighted(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """[M, H + tail] by source -> rows [M, H] and weights [M] by expert."""
        return self.group(rows[:, :width]), self.group(rows[:, width])

    def group(self, rows: Tensor) -> Tensor:
        """[M, H] by source -> by expert; the same tensor if that is one order."""
        return rows if self.grouping is None else rows.index_select(0, self.grouping)

    def ungroup(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """[M, H] by expert -> by source, in `out` if that is given; else the same tensor if that is one order."""
        if self.grouping is None:
            return rows if out is None else out.copy_(rows)
        return torch.index_select(rows, 0, inverse(self.grouping), out=out)

    def ungroup_weighted(self, rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
        """[M, H] and [M] by expert -> [M, H + tail] by source, in `out`."""
        width = rows.shape[1]
        self.ungroup(rows, out[:, :width])
        self.ungroup(weights, out[:, width])
        return out
