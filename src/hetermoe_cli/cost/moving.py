"""Moving experts between ranks: what travels, and how long it takes."""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np

from hetermoe_cli.cost.device import STATE_BYTES
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.spec.layout import Layout


class Move(NamedTuple):
    """One expert of one layer goes from `source`, which holds it, to `targets`, which do not yet."""

    layer: int
    expert: int
    source: int
    targets: tuple[int, ...]


def moves(before: Layout, after: Layout) -> Iterator[Move]:
    """What must travel, layer by layer and by expert; nothing of what a rank merely drops."""
    for layer, (old, new) in enumerate(zip(before.placement, after.placement, strict=True)):
        if old == new:
            continue
        held = holders(before, layer)
        for expert, ranks in sorted(holders(after, layer).items()):
            if targets := tuple(sorted(ranks - held[expert])):
                yield Move(layer, expert, min(held[expert]), targets)


def holders(layout: Layout, layer: int) -> dict[int, set[int]]:
    """Ranks that hold each expert of a layer."""
    placement = layout.placement[layer]
    hosted = {expert: {rank} for rank, experts in enumerate(placement.experts) for expert in experts}
    return hosted | {expert: set(layout.attending_at(layer)) for expert in placement.replicated}


def state_bytes(cost: CostModel) -> int:
    """What travels of one expert: master weights and both moments."""
    precision = cost.train.precision
    weights, _, optimizer = STATE_BYTES[precision]
    own_masters = precision in ("fp32", "fp64")  # narrower ones have theirs among the optimizer's bytes
    return cost.model.expert_parameters * (optimizer + weights * own_masters)


def moving_seconds(cost: CostModel, before: Layout, after: Layout) -> float:
    """Seconds of the network to bring experts and their optimizer states from one placement to another.

    Layers follow each other; the messages of a layer are one transfer. Nothing else uses the network meanwhile.
    """
    size, total = state_bytes(cost), 0.0
    for _, layer in groupby(moves(before, after), key=lambda move: move.layer):
        messages = [(move.source, target) for move in layer for target in move.targets]
        sent = np.zeros((before.world_size, len(messages)))
        for column, (source, _) in enumerate(messages):
            sent[source, column] = size
        total += cost.network.seconds(sent, np.array([target for _, target in messages], dtype=np.intp))
    return total
