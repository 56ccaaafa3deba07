"""The one generator of orders: Layout -> compute order per rank (Theorem 1 of arXiv 2504.03871)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.schedule_choice import ExpertOrder, PassOrder, TransferOrder, windows_ahead

SYNCHRONISE = Action(Kind.SYNCHRONISE, Pass.BACKWARD)
OPTIMIZER = Action(Kind.OPTIMIZER, Pass.BACKWARD)

Order = tuple[Action, ...]

_FORWARD_PLACES = {  # of a layer's tasks and transfers in it; P and X carry the layer after the last one
    Kind.ATTENTION: 0.0,
    Kind.DISPATCH: 0.5,
    Kind.EXPERT: 1.0,
    Kind.COMBINE: 1.5,
    Kind.PASS: 0.0,
    Kind.CROSS: 0.5,
    Kind.GATHER: -2.25,  # one layer ahead
}
_BACKWARD_PLACES = {
    Kind.PASS: 2.0,
    Kind.COMBINE: 0.5,
    Kind.EXPERT: 1.0,
    Kind.DISPATCH: 1.5,
    Kind.ATTENTION: 2.0,
    Kind.REDUCE: 3.75,  # behind the next layer's messages, for which ranks wait; the head's carries a layer more
    Kind.CROSS: 2.5,
}


_LAGS = {  # micro-batches that a task around a head that is apart stays behind, so that what it waits for can arrive
    (Kind.PASS, Pass.FORWARD): 0,
    (Kind.HEAD, Pass.FORWARD): 1,
    (Kind.HEAD, Pass.BACKWARD): 1,
    (Kind.PASS, Pass.BACKWARD): 2,
    (Kind.EXPERT, Pass.BACKWARD): 3,
}


class Part(NamedTuple):
    """What a rank does in an iteration: whether it attends, and in which layers it computes experts.

    `first`, `end` (0: after the last layer) and `ahead` as of its pipeline stage (spec.layout.Span). `gives`: what it
    attends to in the end goes to ranks of the next stage, or of the head; `head`: it computes that.
    """

    attends: bool
    hosts: tuple[bool, ...]
    first: int = 0
    end: int = 0
    ahead: int = 0
    gives: bool = False
    head: bool = True

    @property
    def layers(self) -> range:
        """Those that it works on."""
        return range(self.first, self.end or len(self.hosts))


class Windows(NamedTuple):
    """What a choice means for orders: micro-batches, those of a window, and the three orders (spec.schedule_choice)."""

    micro_batches: int
    width: int
    experts: ExpertOrder = "after"
    transfers: TransferOrder = "layered"
    passes: PassOrder = "in_turn"


def part_of(layout: Layout, rank: int) -> Part:
    """The rank's part in the layout; replicated experts run where it attends."""
    attends, span = layout.sequences_per_rank[rank] > 0, layout.span_of(rank)
    head = not span.ahead and layout.head_share(rank) > 0
    hosts = [
        bool(p.experts[rank] or (attends and p.replicated and layer in span.layers))
        for layer, p in enumerate(layout.placement)
    ]
    return Part(attends, tuple(hosts), span.first, span.end, span.ahead, not span.has_head, head)


def windows_of(layout: Layout) -> Windows:
    """The layout's windows. A single one is woven into nothing."""
    choice = layout.schedule
    passes = choice.passes if choice.micro_batches > choice.window else "in_turn"
    return Windows(choice.micro_batches, choice.window, choice.experts, choice.transfers, passes)


# The planner asks for the same few orders again and again, and a thousand ranks have few parts between them.
@lru_cache(maxsize=2048)
def training_order(part: Part, windows: Windows) -> Order:
    """Compute order of one training iteration.

    Window by window (`steps`): forward layer by layer, all micro-batches of a layer in turn; the head with its own
    backward; backward layer by layer from the last. Experts of an attending rank run after the layer's attention of
    all micro-batches in the window (in backward before it), or between: one micro-batch behind (in backward ahead).
    """
    actions: list[Action] = []
    for step in steps(part.ahead, windows):
        found: list[Action] = []
        for direction, window in step:
            found += (_forward if direction is Pass.FORWARD else _backward)(part, window, windows.experts)
        actions += found if len(step) == 1 else sorted(found, key=lambda action: place_in_pass(action, part.layers))
    return (*actions, SYNCHRONISE, OPTIMIZER)


@lru_cache(maxsize=2048)
def validation_order(part: Part, windows: Windows) -> Order:
    """Compute order of a forward-only pass: the same stages, the head without backward."""
    actions: list[Action] = []
    for window in _ranges(windows):
        actions += _forward(part, window, windows.experts)
        if not part.ahead:
            actions += _turn(part, Pass.FORWARD, window)
    return tuple(actions)


def steps(ahead: int, windows: Windows) -> list[list[tuple[Pass, range]]]:
    """Windows in the order of 1F1B, where `ahead` pipeline stages follow: some go forward first (windows_ahead),
    then one forward and one backward in turn, or woven into one step. Without a pipeline, each goes forward and
    backward at once, or is woven into the next one."""
    found, woven = _ranges(windows), windows.passes == "woven"
    ahead = min(windows_ahead(windows.passes, ahead), len(found))
    result = [[(Pass.FORWARD, window)] for window in found[:ahead]]
    for number, window in enumerate(found):
        following = [(Pass.FORWARD, later) for later in found[number + ahead :][:1]]
        backward = (Pass.BACKWARD, window)
        result += [[*following, backward]] if woven else [*[[one] for one in following], [backward]]
    return result


def place_in_pass(action: Action, layers: range) -> float:
    """How far into its pass a task or transfer of a pipeline stage is: a layer is 2 long, and begins with attention
    (backward: with what it waits for); transfers are in the middle between the tasks at their ends. Sums of gradients
    go behind what an earlier stage waits for."""
    if action.kind is Kind.HEAD:
        return 0.0
    if action.direction is Pass.FORWARD:
        return 2 * (action.layer - layers.start) + _FORWARD_PLACES[action.kind]
    if action.kind is Kind.REDUCE and layers.start:
        return 2 * len(layers) + _BACKWARD_PLACES[Kind.CROSS]
    return 2 * (layers.stop - 1 - action.layer) + _BACKWARD_PLACES[action.kind]


def _ranges(windows: Windows) -> list[range]:
    """Micro-batches that are in flight together."""
    width = windows.width
    return [range(first, first + width) for first in range(0, windows.micro_batches, width)]


def _forward(part: Part, window: range, experts: ExpertOrder) -> list[Action]:
    actions: list[Action] = []
    for layer in part.layers:
        attention, hosted = _layer(part, layer, Pass.FORWARD, window)
        actions += _merge(attention, hosted, experts)
    if part.attends and part.ahead:
        actions += _stage(Kind.PASS, Pass.FORWARD, part.end, window)
    return actions


def _backward(part: Part, window: range, experts: ExpertOrder) -> list[Action]:
    actions: list[Action] = []
    layers = part.layers[::-1]
    if not part.ahead:
        actions += _turn(part, Pass.BACKWARD, window)
        layers = layers[_hosts_in_turn(part) :]
    elif part.attends:
        actions += _stage(Kind.PASS, Pass.BACKWARD, part.end, window)
    for layer in layers:
        attention, hosted = _layer(part, layer, Pass.BACKWARD, window)
        actions += _merge(hosted, attention, experts)
    return actions


def _turn(part: Part, direction: Pass, window: range) -> list[Action]:
    """From the last layer's forward tasks to its backward ones: the head. Where it is apart, a micro-batch goes to its
    ranks and back while others are at work, and ranks that only host give these their experts' gradients meanwhile."""
    actions: list[Action] = []
    if part.attends and part.gives:
        actions += _stage(Kind.PASS, Pass.FORWARD, part.end, window)
    if part.head:
        actions += _stage(Kind.HEAD, direction, 0, window)
    if direction is Pass.BACKWARD and part.attends and part.gives:
        actions += _stage(Kind.PASS, Pass.BACKWARD, part.end, window)
    if direction is Pass.BACKWARD and _hosts_in_turn(part):
        actions += _stage(Kind.EXPERT, Pass.BACKWARD, part.layers[-1], window)

    def place(action: Action) -> tuple[int, int]:
        lag = _LAGS[action.kind, action.direction]
        return action.micro_batch + lag, lag

    return sorted(actions, key=place) if part.gives else actions


def _hosts_in_turn(part: Part) -> bool:
    """Whether it computes the head of what others attend to, and experts of the last layer."""
    return part.gives and part.head and not part.attends and not part.ahead and part.hosts[part.layers[-1]]


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
