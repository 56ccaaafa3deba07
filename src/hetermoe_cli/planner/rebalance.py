"""Rebalancing: whether other places for named experts pay under a measured load, sequences and schedule kept.

Candidates: the experts placed by name for several aims (named.py), with equal ranks renumbered so that few experts
move; then single moves, swaps and copies of the best so far. Each is judged by its replay over the steps that are left
plus the time that moving takes, and must fit into memory.
"""

import time
from collections.abc import Iterator
from math import inf

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.cost.moving import moves, moving_seconds
from hetermoe_cli.planner.named import AIMS, Named
from hetermoe_cli.planner.replay import busy_bound, overflow
from hetermoe_cli.planner.single_moves import neighbours
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.rebalance import Decision

SOLVE_SECONDS = 3.0
LEAST_GAIN = 0.02  # of the iteration: less is within what a prediction is off


class _Search:
    """The layout whose steps and move are shortest together, of those that fit into memory."""

    def __init__(self, cost: CostModel, current: Layout, remaining_steps: int, seconds: float) -> None:
        self.cost, self.current, self.remaining = cost, current, remaining_steps
        self.deadline = time.monotonic() + seconds
        self.layout: Layout | None = None
        self.seconds = self.total = self.fastest = inf
        self.offer(current)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def offer(self, layout: Layout) -> bool:
        """Keep `layout` if it is better."""
        layout_cost = LayoutCost(self.cost, layout)
        if overflow(layout_cost) or busy_bound(layout_cost) * self.remaining >= self.total:
            return False
        seconds = simulate(layout_cost).seconds
        self.fastest = min(self.fastest, seconds)
        total = seconds * self.remaining + moving_seconds(self.cost, self.current, layout)
        if total >= self.total:
            return False
        self.layout, self.seconds, self.total = layout, seconds, total
        return True


def decide(
    cost: CostModel,
    current: Layout,
    planned: Layout,
    remaining_steps: int,
    *,
    copies: bool = True,
    seconds: float = SOLVE_SECONDS,
) -> Decision:
    """Where experts should be for the `remaining_steps` under the load and speeds of `cost`.

    `planned`: the plan's layout, whose counts say what ranks have time for. Without `copies`, what is replicated stays.
    """
    before = simulate(LayoutCost(cost, current)).seconds
    search = _Search(cost, current, remaining_steps, seconds)
    fits = search.layout is not None
    for layout in _candidates(search, planned, copies):
        search.offer(layout)
        if search.over:
            break
    found = search.layout
    if found is None:
        return _stay(before, "no placement fits into memory under this load")
    if found.placement == current.placement:
        if before - search.fastest < LEAST_GAIN * before:
            return _stay(before, "no placement is predicted to be clearly faster")
        gain = (before - search.fastest) * 1e3
        return _stay(
            before, f"moving takes longer than the {gain:.3g} ms an iteration that {remaining_steps} steps gain"
        )
    if fits and before - search.seconds < LEAST_GAIN * before:
        return _stay(before, "no placement is predicted to be clearly faster")
    return Decision(
        placement=found.placement,
        before_seconds=before,
        after_seconds=search.seconds,
        move_seconds=moving_seconds(cost, current, found),
        moved=sum(len(move.targets) for move in moves(current, found)),
    )


def _stay(seconds: float, reason: str) -> Decision:
    return Decision(
        placement=None, reason=reason, before_seconds=seconds, after_seconds=seconds, move_seconds=0.0, moved=0
    )


def _candidates(search: _Search, planned: Layout, copies: bool) -> Iterator[Layout]:
    """Layouts to offer; later ones start from the best so far."""
    kinds = _kinds(search.cost, search.current)
    aimed = [Named(search.cost, layout) for layout in _different(planned, search.current)]
    for named in aimed:
        for aim in AIMS:
            if (aim.more_copies and not copies) or (aim.mean and named.steady):
                continue
            if layout := named.place(aim):
                yield renumbered(layout, search.current, kinds)
                yield layout
    while not search.over:
        before = search.total
        for layer in range(search.cost.model.layers):
            base = search.layout or search.current
            for placement in neighbours(aimed[0], base, layer):
                if copies or placement.replicated == base.placement[layer].replicated:
                    yield _with_layer(base, layer, placement)
                if search.layout is not base:  # the others start from where it was
                    break
        if search.total >= before:
            return


def _different(first: Layout, second: Layout) -> list[Layout]:
    return [first] if first.placement == second.placement else [first, second]


def _with_layer(layout: Layout, layer: int, placement: LayerPlacement) -> Layout:
    placements = list(layout.placement)
    placements[layer] = placement
    return layout.model_copy(update={"placement": placements})


def _kinds(cost: CostModel, layout: Layout) -> list[list[int]]:
    """Ranks that can take each other's experts at equal compute: of one device type, with as many sequences."""
    found: dict[object, list[int]] = {}
    for rank, device in enumerate(cost.devices):
        found.setdefault((device.type, layout.sequences_per_rank[rank]), []).append(rank)
    return list(found.values())


def renumbered(layout: Layout, current: Layout, kinds: list[list[int]]) -> Layout:
    """`layout` with the bundles of equal ranks exchanged, layer by layer, so that most experts stay where they are."""
    placements = []
    for old, new in zip(current.placement, layout.placement, strict=True):
        experts = list(new.experts)
        for ranks in kinds:
            pairs = [
                (len({*old.experts[to]} & {*new.experts[rank]}), to == rank, rank, to) for rank in ranks for to in ranks
            ]
            sources, targets = set(ranks), set(ranks)
            for *_, rank, to in sorted(pairs, key=lambda pair: (-pair[0], not pair[1])):
                if rank in sources and to in targets:
                    experts[to] = new.experts[rank]
                    sources.remove(rank)
                    targets.remove(to)
        placements.append(LayerPlacement(experts=experts, replicated=new.replicated))
    return layout.model_copy(update={"placement": placements})
