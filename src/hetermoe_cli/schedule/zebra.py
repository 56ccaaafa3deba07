"""The one generator of orders: Layout -> compute order per rank (paper section 2, Theorem 1)."""

from collections.abc import Iterator

from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.spec.plan import ExpertOrder, Layout

SYNCHRONISE = Action(Kind.SYNCHRONISE, Pass.BACKWARD)
OPTIMIZER = Action(Kind.OPTIMIZER, Pass.BACKWARD)


def training_order(layout: Layout, rank: int) -> tuple[Action, ...]:
    """Compute order of one training iteration.

    Window by window: forward layer by layer, all micro-batches of a layer in turn; the head with its own backward;
    backward layer by layer from the last. Experts of an attending rank run after the layer's attention of all
    micro-batches in the window (in backward before it), or between: one micro-batch behind (in backward ahead).
    """
    actions: list[Action] = []
    for window in _windows(layout):
        actions += _forward(layout, rank, window)
        actions += _backward(layout, rank, window)
    return (*actions, SYNCHRONISE, OPTIMIZER)


def validation_order(layout: Layout, rank: int) -> tuple[Action, ...]:
    """Compute order of a forward-only pass: the same stages, the head without backward."""
    actions: list[Action] = []
    for window in _windows(layout):
        actions += _forward(layout, rank, window)
        if layout.sequences_per_rank[rank]:
            actions += [Action(Kind.HEAD, Pass.FORWARD, 0, j) for j in window]
    return tuple(actions)


def _windows(layout: Layout) -> list[range]:
    """Micro-batches that are in flight together."""
    width = layout.schedule.window
    return [range(first, first + width) for first in range(0, layout.micro_batches, width)]


def _forward(layout: Layout, rank: int, window: range) -> Iterator[Action]:
    for layer in range(layout.layers):
        attention, experts = _layer(layout, rank, layer, Pass.FORWARD, window)
        yield from _merge(attention, experts, layout.schedule.experts)


def _backward(layout: Layout, rank: int, window: range) -> Iterator[Action]:
    if layout.sequences_per_rank[rank]:
        yield from (Action(Kind.HEAD, Pass.BACKWARD, 0, j) for j in window)
    for layer in reversed(range(layout.layers)):
        attention, experts = _layer(layout, rank, layer, Pass.BACKWARD, window)
        yield from _merge(experts, attention, layout.schedule.experts)


def _layer(layout: Layout, rank: int, layer: int, direction: Pass, window: range) -> tuple[list[Action], list[Action]]:
    """The rank's attention and expert tasks of one layer; none of a kind that it has no part in."""
    attends, hosts = layout.sequences_per_rank[rank], layout.local_experts(layer, rank)
    attention = [Action(Kind.ATTENTION, direction, layer, j) for j in window] if attends else []
    return attention, [Action(Kind.EXPERT, direction, layer, j) for j in window] if hosts else []


def _merge(first: list[Action], second: list[Action], order: ExpertOrder) -> list[Action]:
    """`second` after all of `first`, or each of it after the next one of `first`."""
    if order == "after" or not first or not second:
        return first + second
    pairs = zip(first[1:], second[:-1], strict=True)
    return [first[0], *(action for pair in pairs for action in pair), second[-1]]
