"""Other places for the named experts of one group under a measured load, sequences and schedule kept.

Candidates: the experts placed by name for several aims (by_name/named.py), with equal ranks renumbered so that few
experts move; then single moves, swaps and copies of the best so far. Each is judged by its replay over the steps that
are left plus the time that moving takes, and must fit into memory.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import inf

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.moving import moving_seconds
from hetermoe_cli.planner.by_name.named import Named
from hetermoe_cli.planner.by_name.single_moves import improve_layers
from hetermoe_cli.planner.replay import busy_bound, overflow
from hetermoe_cli.schedule.zebra import OPTIMIZER
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import LayerPlacement, Layout


class Search:
    """The layout whose steps and move are shortest together, of those that fit into memory."""

    def __init__(
        self,
        cost_of: Callable[[Layout], LayoutCost],
        current: Layout,
        remaining_steps: int,
        end: float,
        others: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """`cost_of`: a layout's costs, with what it sums with other groups. `end`: on the monotonic clock. `others`:
        from when on other groups could step, and their slowest step: being faster than they are is worth nothing."""
        self.current, self._cost_of = current, cost_of
        self.cost = cost_of(current).cost
        self._remaining, self._end, self._others = remaining_steps, end, others
        self.layout: Layout | None = None
        self.ready = self.total = self.fastest = inf
        self.offer(current)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._end

    def offer(self, layout: Layout) -> bool:
        """Keep `layout` if it is better."""
        if layout.replicates_in_shifts:
            return False
        layout_cost = self._cost_of(layout)
        least = max(busy_bound(layout_cost), sum(self._others))
        if overflow(layout_cost) or least * self._remaining >= self.total:
            return False
        optimizer = max(layout_cost.seconds(rank, OPTIMIZER) for rank in range(layout.world_size))
        ready = simulate(layout_cost).seconds - optimizer
        seconds = max(ready, self._others[0]) + max(optimizer, self._others[1])
        self.fastest = min(self.fastest, seconds)
        total = seconds * self._remaining + moving_seconds(self.cost, self.current, layout)
        if total >= self.total:
            return False
        self.layout, self.ready, self.total = layout, ready, total
        return True


def search(found: Search, planned: Layout) -> None:
    """Offer `found` candidates until its time is up; `planned`: the plan's layout, whose counts say what ranks have
    time for."""
    aimed = [_named(found.cost, layout) for layout in _different(planned, found.current)]
    for layout in _placed(aimed, found.current, kinds_of(found.cost, found.current)):
        found.offer(layout)
        if found.over:
            return
    while improve_layers(aimed[0], found, found.current):
        pass


def _placed(aimed: Sequence[Named], current: Layout, kinds: list[list[int]]) -> Iterator[Layout]:
    """The experts placed for every aim, in bundles renumbered and not."""
    for named in aimed:
        for layout in filter(None, map(named.place, named.aims)):
            yield renumbered(layout, current, kinds)
            yield layout


def _named(cost: CostModel, layout: Layout) -> Named:
    """Its ranks should have time for what they have in `layout` at their profiled speeds."""
    named = Named(cost, layout)
    named.target = Named(CostModel(cost.inputs), layout).target
    return named


def _different(first: Layout, second: Layout) -> list[Layout]:
    return [first] if first.placement == second.placement else [first, second]


def kinds_of(cost: CostModel, layout: Layout) -> list[list[int]]:
    """Ranks that can take each other's experts at equal compute: of one device type and pipeline stage, with as many
    sequences of as many micro-batches, and as much of the head."""
    found: dict[object, list[int]] = {}
    for rank, device in enumerate(cost.devices):
        own = layout.sequences_per_rank[rank], layout.on_shift(rank), layout.head_sequences(rank)
        found.setdefault((device.type, layout.span_of(rank).number, *own), []).append(rank)
    return list(found.values())


def renumbered(layout: Layout, current: Layout, kinds: list[list[int]]) -> Layout:
    """`layout` with the bundles of equal ranks exchanged, layer by layer, so that many experts stay where they are.

    Greedy: the bundle that has most in common with what a rank holds goes there first.
    """
    kind_of = {rank: index for index, ranks in enumerate(kinds) for rank in ranks}
    placements = []
    for old, new in zip(current.placement, layout.placement, strict=True):
        host = {expert: rank for rank, experts in enumerate(old.experts) for expert in experts}
        pairs = Counter(
            (rank, host[expert]) for rank, held in enumerate(new.experts) for expert in held if expert in host
        )
        goal: dict[int, int] = {}
        taken: set[int] = set()
        for (rank, to), _ in sorted(pairs.items(), key=lambda item: (-item[1], item[0][0] != item[0][1], item[0])):
            if rank not in goal and to not in taken and kind_of[rank] == kind_of[to]:
                goal[rank] = to
                taken.add(to)
        for ranks in kinds:
            free = [to for to in ranks if to not in taken]
            goal |= zip((rank for rank in ranks if rank not in goal), free, strict=True)
        experts = [new.experts[rank] for rank in sorted(goal, key=lambda rank: goal[rank])]
        placements.append(LayerPlacement(experts=experts, replicated=new.replicated))
    return layout.model_copy(update={"placement": placements})
