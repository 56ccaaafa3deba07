"""Placements of a layer that differ by one expert's move, swap or copy, as a local search wants to try them."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from hetermoe_cli.planner.arrays import FloatArray, IntArray
from hetermoe_cli.planner.by_name.assign import LayerWork, changes
from hetermoe_cli.planner.by_name.named import Named, placement_of
from hetermoe_cli.spec.layout import LayerPlacement, Layout

TRIED = 2  # moves, and swaps, from one rank


class Judge(Protocol):
    """Keeps the best layout of those offered; None while none of them fits."""

    layout: Layout | None

    @property
    def over(self) -> bool:
        """Whether the time is up."""

    def offer(self, layout: Layout, /) -> bool:
        """Keep `layout` if it is better."""


def improve_layers(aimed: Named, judge: Judge, start: Layout) -> bool:
    """Offer changes of the best layout, or of `start` while nothing fits, of each layer until one helps.

    Whether some did, and there is time for more.
    """
    helped = False
    for layer in range(aimed.layers):
        base = judge.layout or start
        for placement in neighbours(aimed, base, layer):
            if judge.over:
                return False
            if judge.offer(_with_layer(base, layer, placement)):
                helped = True
                break  # the others start from where it was
    return helped


def _with_layer(layout: Layout, layer: int, placement: LayerPlacement) -> Layout:
    placements = list(layout.placement)
    placements[layer] = placement
    return layout.model_copy(update={"placement": placements})


def neighbours(aimed: Named, layout: Layout, layer: int) -> Iterator[LayerPlacement]:
    """Changes of `layout` that relieve the rank that is latest in `layer`, or latest over all layers.

    Late is over the seconds that `aimed` gives its ranks. Memory is left to the caller.
    """
    placement = layout.placement[layer]
    hosted, hosts = hosts_of(placement)
    copies = np.array(placement.replicated, dtype=np.int64)
    work = _work(aimed, layer, hosted, copies)
    over = lateness(aimed, layout)
    over[:, np.bincount(hosts, minlength=aimed.world) == 0] = -np.inf  # nothing to take from them
    for source in sorted({int(over[layer].argmax()), int(over.sum(axis=0).argmax())}):
        for change in changes(work, hosts, source, TRIED):
            yield placement_of(hosted, change.hosts, copies, aimed.world)
    rank_of = aimed.hottest[layer].argsort()
    if len(hosted):
        hottest = hosted[rank_of[hosted].argmin()]
        rest = hosted != hottest
        yield placement_of(hosted[rest], hosts[rest], np.append(copies, hottest), aimed.world)
    if len(copies):
        coldest = copies[rank_of[copies].argmax()]
        more = np.append(hosted, coldest)
        ends = work.ends(hosts) + aimed.seconds(layer)[:, coldest]
        free = int(np.where(aimed.inside[layer], ends, np.inf).argmin())
        yield placement_of(more, np.append(hosts, free), copies[copies != coldest], aimed.world)


def lateness(aimed: Named, layout: Layout) -> FloatArray:
    """[layers, ranks] seconds of the experts above those that `aimed` gives."""
    result = -aimed.target
    for layer, placement in enumerate(layout.placement):
        seconds = aimed.seconds(layer)
        result[layer] += [seconds[rank, experts].sum() for rank, experts in enumerate(placement.experts)]
        result[layer] += aimed.copied(layer, placement.replicated)[0]
    return result


def hosts_of(placement: LayerPlacement) -> tuple[IntArray, IntArray]:
    """Hosted experts by rank, and their ranks."""
    pairs = [(expert, rank) for rank, experts in enumerate(placement.experts) for expert in experts]
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _work(aimed: Named, layer: int, hosted: IntArray, copies: IntArray) -> LayerWork:
    free = np.full(aimed.world, np.inf)
    most = aimed.experts * aimed.inside[layer]
    seconds = aimed.seconds(layer)[:, hosted]
    return LayerWork(seconds, aimed.copied(layer, copies)[0] - aimed.target[layer], np.zeros(seconds.shape), free, most)
