"""Who gets which rows: the permutations of dispatch and combine, as plain tensors and sizes.

T = tokens of the rank's micro-batch, k = choices a token, H = hidden size. A token travels once per chosen expert.
"""

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from hetermoe_cli.spec.layout import Layout


class LayerMap:
    """Static facts of one layer on one rank: the order in which rows for each expert are sent and computed."""

    def __init__(self, layout: Layout, layer: int, rank: int) -> None:
        self.rank, self.world_size = rank, layout.world_size
        self.hosted = list(layout.placement[layer].experts)
        self.replicated = layout.placement[layer].replicated
        self.attends = bool(layout.sequences_per_rank[rank])
        self.local = layout.local_experts(layer, rank)
        self.attending = layout.attending
        self._key = self._send_keys(layout.experts)
        self._bounds = list(accumulate((self._slots(target) for target in range(self.world_size)), initial=0))

    def _slots(self, target: int) -> int:
        """How many experts this rank's rows can go to on `target`."""
        own = len(self.replicated) if target == self.rank and self.attends else 0
        return len(self.hosted[target]) + own

    def _send_keys(self, experts: int) -> Tensor:
        """[experts] position of each expert in this rank's sending order: by target rank, then as local there."""
        key = torch.full((experts,), -1, dtype=torch.int64)
        position = 0
        for target in range(self.world_size):
            own = self.replicated if target == self.rank and self.attends else []
            for expert in [*self.hosted[target], *own]:
                key[expert] = position
                position += 1
        return key

    def route(self, experts: Tensor) -> "Routing":
        """Plan the sending of every (token, choice); experts [T, k]."""
        keys = self._key.to(experts.device)[experts.flatten()]
        order = keys.argsort(stable=True)
        counts = keys.bincount(minlength=self._bounds[-1]).tolist()
        per_target = [counts[low:high] for low, high in zip(self._bounds, self._bounds[1:], strict=False)]
        return Routing(order, experts.shape[1], per_target, [counts[key] for key in self._key.tolist()])

    def arrivals(self, counts_by_source: dict[int, list[int]], device: torch.device | str = "cpu") -> "Arrivals":
        """Plan the grouping by expert of rows that come source by source."""
        table = [
            (counts + [0] * (len(self.local) - len(counts)))
            for counts in (counts_by_source.get(source, []) for source in range(self.world_size))
        ]
        return Arrivals.of(table, len(self.local), device)


@dataclass
class Routing:
    """Sending side of one (layer, micro-batch). `order` [T * k]: the (token, choice) slots in sending order."""

    order: Tensor
    top_k: int
    counts: list[list[int]]  # [target][local expert there]
    by_expert: list[int]
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = [sum(counts) for counts in self.counts]

    def gather(self, rows: Tensor) -> Tensor:
        """rows [T, H] -> [T * k, H] in sending order."""
        return rows[self.order // self.top_k]

    def gather_choices(self, outputs: Tensor) -> Tensor:
        """outputs [T, k, H] -> [T * k, H] in sending order."""
        return outputs.flatten(0, 1)[self.order]

    def to_tokens(self, sent: Tensor) -> Tensor:
        """[T * k, H] in sending order -> [T, k, H]."""
        result = torch.empty_like(sent)
        result[self.order] = sent
        return result.view(-1, self.top_k, sent.shape[-1])


@dataclass
class Arrivals:
    """Receiving side. Rows come source by source, each sorted by local expert; experts compute them grouped.

    `grouping` [M]: arrival positions in computing order; `counts`: rows per local expert; `sizes`: rows per source.
    """

    grouping: Tensor
    counts: list[int]
    sizes: list[int]

    @classmethod
    def of(cls, table: list[list[int]], experts: int, device: torch.device | str = "cpu") -> "Arrivals":
        """table[source][local expert] = rows."""
        matrix = torch.tensor(table, dtype=torch.int64).view(len(table), experts)
        labels = torch.arange(experts).repeat(len(table)).repeat_interleave(matrix.flatten())
        return cls(
            grouping=labels.argsort(stable=True).to(device),
            counts=matrix.sum(dim=0).tolist(),
            sizes=matrix.sum(dim=1).tolist(),
        )

    def group(self, rows: Tensor) -> Tensor:
        """[M, H] by source -> by expert."""
        return rows[self.grouping]

    def ungroup(self, rows: Tensor) -> Tensor:
        """[M, H] by expert -> by source."""
        result = torch.empty_like(rows)
        result[self.grouping] = rows
        return result
