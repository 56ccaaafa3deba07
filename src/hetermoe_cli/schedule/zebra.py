"""The one generator of orders: Layout -> compute order per rank (paper section 2, Theorem 1)."""

from collections.abc import Iterator

from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.spec.plan import Layout

SYNCHRONISE = Action(Kind.SYNCHRONISE, Pass.BACKWARD)
OPTIMIZER = Action(Kind.OPTIMIZER, Pass.BACKWARD)


def training_order(layout: Layout, rank: int) -> tuple[Action, ...]:
    """Compute order of one training iteration.

    `zebra`: forward layer by layer, all micro-batches of a layer in turn; the head with its own backward; backward
    layer by layer from the last. `sequential`: the same for one micro-batch after another, nothing overlapped.
    Experts of an attending rank run after the layer's attention of all micro-batches in a group.
    """
    actions: list[Action] = []
    for group in _groups(layout):
        actions += _forward(layout, rank, group)
        actions += _backward(layout, rank, group)
    return (*actions, SYNCHRONISE, OPTIMIZER)


def validation_order(layout: Layout, rank: int) -> tuple[Action, ...]:
    """Compute order of a forward-only pass: the same stages, the head without backward."""
    actions: list[Action] = []
    for group in _groups(layout):
        actions += _forward(layout, rank, group)
        if layout.sequences_per_rank[rank]:
            actions += [Action(Kind.HEAD, Pass.FORWARD, 0, j) for j in group]
    return tuple(actions)


def _groups(layout: Layout) -> list[range]:
    """Micro-batches that are in flight together."""
    count = layout.micro_batches
    if layout.schedule.name == "sequential":
        return [range(j, j + 1) for j in range(count)]
    return [range(count)]


def _forward(layout: Layout, rank: int, group: range) -> Iterator[Action]:
    for layer in range(layout.layers):
        if layout.sequences_per_rank[rank]:
            yield from (Action(Kind.ATTENTION, Pass.FORWARD, layer, j) for j in group)
        if layout.local_experts(layer, rank):
            yield from (Action(Kind.EXPERT, Pass.FORWARD, layer, j) for j in group)


def _backward(layout: Layout, rank: int, group: range) -> Iterator[Action]:
    attends = bool(layout.sequences_per_rank[rank])
    if attends:
        yield from (Action(Kind.HEAD, Pass.BACKWARD, 0, j) for j in group)
    for layer in reversed(range(layout.layers)):
        if layout.local_experts(layer, rank):
            yield from (Action(Kind.EXPERT, Pass.BACKWARD, layer, j) for j in group)
        if attends:
            yield from (Action(Kind.ATTENTION, Pass.BACKWARD, layer, j) for j in group)
