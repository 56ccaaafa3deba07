"""The one generator of orders: Layout -> compute order per rank (Theorem 1 of arXiv 2504.03871)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.spec.layout import ExpertOrder, Layout, TransferOrder

SYNCHRONISE = Action(Kind.SYNCHRONISE, Pass.BACKWARD)
OPTIMIZER = Action(Kind.OPTIMIZER, Pass.BACKWARD)

Order = tuple[Action, ...]


class Part(NamedTuple):
    """What a rank does in an iteration: whether it attends, and in which layers it computes experts."""

    attends: bool
    hosts: tuple[bool, ...]


class Windows(NamedTuple):
    """What a choice means for orders: micro-batches, those of a window, and the two orders (spec.layout)."""

    micro_batches: int
    width: int
    experts: ExpertOrder = "after"
    transfers: TransferOrder = "layered"


def part_of(layout: Layout, rank: int) -> Part:
    """The rank's part in the layout; replicated experts run where it attends."""
    attends = layout.sequences_per_rank[rank] > 0
    return Part(attends, tuple([bool(p.experts[rank] or (attends and p.replicated)) for p in layout.placement]))


def windows_of(layout: Layout) -> Windows:
    """The layout's windows."""
    choice = layout.schedule
    return Windows(choice.micro_batches, choice.window, choice.experts, choice.transfers)


# The planner asks for the same few orders again and again, and a thousand ranks have few parts between them.
@lru_cache(maxsize=2048)
def training_order(part: Part, windows: Windows) -> Order:
    """Compute order of one training iteration.

    Window by window: forward layer by layer, all micro-batches of a layer in turn; the head with its own backward;
    backward layer by layer from the last. Experts of an attending rank run after the layer's attention of all
    micro-batches in the window (in backward before it), or between: one micro-batch behind (in backward ahead).
    """
    actions: list[Action] = []
    for window in _ranges(windows):
        actions += _forward(part, window, windows.experts)
        actions += _backward(part, window, windows.experts)
    return (*actions, SYNCHRONISE, OPTIMIZER)


@lru_cache(maxsize=2048)
def validation_order(part: Part, windows: Windows) -> Order:
    """Compute order of a forward-only pass: the same stages, the head without backward."""
    actions: list[Action] = []
    for window in _ranges(windows):
        actions += _forward(part, window, windows.experts)
        if part.attends:
            actions += _stage(Kind.HEAD, Pass.FORWARD, 0, window)
    return tuple(actions)


def _ranges(windows: Windows) -> list[range]:
    """Micro-batches that are in flight together."""
    width = windows.width
    return [range(first, first + width) for first in range(0, windows.micro_batches, width)]


def _forward(part: Part, window: range, experts: ExpertOrder) -> list[Action]:
    actions: list[Action] = []
    for layer in range(len(part.hosts)):
        attention, hosted = _layer(part, layer, Pass.FORWARD, window)
        actions += _merge(attention, hosted, experts)
    return actions


def _backward(part: Part, window: range, experts: ExpertOrder) -> list[Action]:
    actions: list[Action] = []
    if part.attends:
        actions += _stage(Kind.HEAD, Pass.BACKWARD, 0, window)
    for layer in reversed(range(len(part.hosts))):
        attention, hosted = _layer(part, layer, Pass.BACKWARD, window)
        actions += _merge(hosted, attention, experts)
    return actions


def _layer(part: Part, layer: int, direction: Pass, window: range) -> tuple[Order, Order]:
    """The rank's attention and expert tasks of one layer; none of a kind that it has no part in."""
    attention = _stage(Kind.ATTENTION, direction, layer, window) if part.attends else ()
    return attention, _stage(Kind.EXPERT, direction, layer, window) if part.hosts[layer] else ()


@lru_cache(maxsize=16384)
def _stage(kind: Kind, direction: Pass, layer: int, window: range) -> Order:
    """One stage of all micro-batches in a window; all orders share these objects."""
    return tuple([Action(kind, direction, layer, j) for j in window])


def _merge(first: Sequence[Action], second: Sequence[Action], order: ExpertOrder) -> list[Action]:
    """`second` after all of `first`, or each of it after the next one of `first`."""
    if order == "after" or not first or not second:
        return [*first, *second]
    pairs = zip(first[1:], second[:-1], strict=True)
    return [first[0], *(action for pair in pairs for action in pair), second[-1]]
