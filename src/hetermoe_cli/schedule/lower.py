"""Lowering: compute orders -> Schedule, by adding every transfer with its senders and receivers."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from math import inf
from typing import Literal

from hetermoe_cli.schedule.action import Action, Kind, Pass
from hetermoe_cli.schedule.gathers import gathers
from hetermoe_cli.schedule.schedule import Schedule, is_whole, segment_of
from hetermoe_cli.schedule.zebra import (
    Order,
    Part,
    Windows,
    part_of,
    place_in_pass,
    steps,
    training_order,
    validation_order,
    windows_of,
)
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.world import World

_OrderOf = Callable[[Part, Windows], Order]
_PassOf = tuple[Pass, int]  # direction, and number of the window
_Weights = Literal["whole", "renewed", "sharded"]  # never gathered, once an iteration, or whenever they are needed
_OF_ATTENDING = (Kind.ATTENTION, Kind.PASS, Kind.HEAD)
_LENGTH = {Pass.FORWARD: 1.0, Pass.BACKWARD: 2.0}


def training_schedule(layout: Layout, copies: int = 1) -> Schedule:
    """One training iteration, with communication.

    `copies`: groups that train the model side by side. Where there are several, hosts take part in reducing a layer's
    gradients, and in gathering its new weights, as well, as other groups hold the same experts.
    """
    return _lower(layout, training_order, copies)


def validation_schedule(layout: Layout, copies: int = 1) -> Schedule:
    """One forward-only pass over R micro-batches, with communication; `copies` as above."""
    return _lower(layout, validation_order, copies)


def training_schedules(world: World) -> list[Schedule]:
    """One training iteration of every copy."""
    return [training_schedule(replica.layout, len(world.replicas)) for replica in world.replicas]


def validation_schedules(world: World) -> list[Schedule]:
    """One forward-only pass of every copy."""
    return [validation_schedule(replica.layout, len(world.replicas)) for replica in world.replicas]


@dataclass(frozen=True)
class _Orders:
    """A layout, which is as good as any other one of the same `key`: how many experts a rank hosts makes no order."""

    key: tuple[object, ...]
    layout: Layout = field(compare=False)

    @classmethod
    def of(cls, layout: Layout) -> "_Orders":
        hosts = tuple([(*map(bool, layer.experts), bool(layer.replicated)) for layer in layout.placement])
        stages = tuple([(stage.layers, *stage.ranks) for stage in layout.pipeline])
        shifts, heads = tuple(map(tuple, layout.shifts)), tuple(map(bool, layout.head))
        return cls((layout.schedule, tuple(map(bool, layout.sequences_per_rank)), hosts, stages, shifts, heads), layout)


def _lower(layout: Layout, order_of: _OrderOf, copies: int) -> Schedule:
    return _lowered(_Orders.of(layout), order_of, copies)


@lru_cache(maxsize=8)
def _lowered(orders: _Orders, order_of: _OrderOf, copies: int) -> Schedule:
    layout = orders.layout
    windows = windows_of(layout)
    compute = tuple(
        [_on_shift(order_of(part_of(layout, rank), windows), layout, rank) for rank in range(layout.world_size)]
    )
    transfers: list[Action] = []
    senders: dict[Action, tuple[int, ...]] = {}
    receivers: dict[Action, tuple[int, ...]] = {}
    hosting = [tuple(layout.hosting(layer)) for layer in range(layout.layers)]
    borders = (*[span.first for span in layout.spans], layout.layers)
    order, after = _transfer_order(order_of, borders, windows, _weights_of(layout), bool(layout.head))
    for action in order:
        attending = layout.attending_at(action.layer)
        if action.is_collective:
            others = copies > 1 and is_whole(action, layout.micro_batches) and action.layer < layout.layers
            hosts = hosting[action.layer] if others else ()
            if copies > 1 or len(attending) > 1:
                transfers.append(action)
                senders[action] = receivers[action] = tuple(sorted({*attending, *hosts}))
            continue
        if action.kind is Kind.CROSS:
            before, forward = layout.crew(action.layer - 1, action.micro_batch), action.direction is Pass.FORWARD
            if before == attending and len(before) == 1:
                continue  # every token stays on its device
            transfers.append(action)
            senders[action], receivers[action] = (before, attending) if forward else (attending, before)
            continue
        hosts = hosting[action.layer]
        crew = layout.crew(action.layer, action.micro_batch)
        if not hosts or (hosts == crew and len(crew) == 1):
            continue  # every row stays on its device
        transfers.append(action)
        senders[action], receivers[action] = (crew, hosts) if action.towards_experts else (hosts, crew)
    lasts = tuple(sorted({shift[-1] for shift in layout.shifts if shift}))
    return Schedule(compute, tuple(transfers), senders, receivers, after, lasts)


def _on_shift(order: Order, layout: Layout, rank: int) -> Order:
    """A rank's order without what it does not attend to; heads that are apart are of all micro-batches."""
    kinds = _OF_ATTENDING[: -1 if layout.head else None]
    return _some_of(order, kinds, tuple(layout.shifts[rank])) if layout.shifts and layout.shifts[rank] else order


@lru_cache(maxsize=256)
def _some_of(order: Order, kinds: tuple[Kind, ...], shift: tuple[int, ...]) -> Order:
    return tuple([action for action in order if action.kind not in kinds or action.micro_batch in shift])


def _weights_of(layout: Layout) -> _Weights:
    return "sharded" if layout.gathers else "renewed" if layout.renews else "whole"


@lru_cache(maxsize=256)
def _transfer_order(
    order_of: _OrderOf, borders: tuple[int, ...], windows: Windows, weights: _Weights, apart: bool
) -> tuple[Order, dict[Action, Action]]:
    """Transfers of all pipeline stages in one order, and the stages that gathers follow. `borders`: their first layers,
    and one after the last layer. `apart`: hidden states go to other ranks for the head.

    They go by when they would begin if all forward passes of a window took as long, all backward ones twice that, and
    what a stage transfers during one were evenly spread over it; of woven passes, if all tasks took as long. What
    crosses to another stage comes where its task ends, later than it would in the middle of its place: ahead of time
    it would hold up what shares its ports. New weights of a stage are gathered while the one before makes its first
    hidden states.
    """
    layers, last = borders[-1], len(borders) - 2
    found: list[tuple[float, int, bool, Action]] = []
    after: dict[Action, Action] = {}
    times = _times(last + 1, windows)
    for number, (first, end) in enumerate(pairwise(borders)):
        ahead = last - number
        part = Part(True, (False,) * layers, first, end, ahead, gives=apart or ahead > 0, head=not ahead)
        by_pass, own = _orders_of_stage(order_of, part, windows, weights)
        for key, transfers in by_pass.items():
            for place, transfer in enumerate(transfers):
                if windows.passes == "woven":
                    begins, length = times[number][_pass_of(transfer, windows)]
                    begins += length * place_in_pass(transfer, part.layers) / (2 * len(part.layers) + 1)
                else:
                    begins, length = times[number][key]
                    begins += length / len(transfers) * (place + (1 if transfer.kind is Kind.CROSS else 0.5))
                if first and transfer.kind is Kind.GATHER:
                    begins, length = times[number - 1][Pass.FORWARD, 0]
                    begins += length / 2
                found.append((begins, -number, transfer.direction is Pass.BACKWARD, transfer))
        after |= own
    return tuple([transfer for *_, transfer in sorted(found, key=lambda one: one[:3])]), after


def _orders_of_stage(
    order_of: _OrderOf, part: Part, windows: Windows, weights: _Weights
) -> tuple[dict[_PassOf, list[Action]], dict[Action, Action]]:
    """Transfers of one pipeline stage, by pass, in the order of its attending ranks' stages.

    All dispatches of a layer's micro-batches go before their combines: an attending rank that hosts experts runs
    them after the layer's attention, so a combine placed earlier would hold up the dispatches behind it. With experts
    between micro-batches, forward answers follow one micro-batch behind and backward answers come one ahead. Where
    transfers are interleaved, all answers come one micro-batch ahead of the next layer's messages. The last stages
    (head of a validation, backward of layer 0) send nothing, so that every answer is in before they end.

    A layer's gradients are reduced once its last backward is done, while the layer before runs its own. Layered: just
    before the last answer there, which only one stage waits for. Interleaved: right after the first one, which the next
    message towards the experts needs anyway; later, that message would wait for more answers where it shares a port
    with the gradients. Weights are gathered at the same places, before gradients, as stages wait for them. Where an
    earlier pipeline stage follows, all gradients are reduced behind what crosses to it: it waits for that, and its own
    backward hides them.
    """
    layers = len(part.hosts)
    own = [a for a in order_of(part, windows) if a.kind in _OF_ATTENDING]
    trains = any(a.direction is Pass.BACKWARD for a in own)

    def turns(action: Action) -> bool:
        return part.gives and not part.ahead and action.kind is not Kind.ATTENTION

    def pass_of(action: Action) -> _PassOf:
        return _pass_of(action._replace(direction=Pass.BACKWARD) if trains and turns(action) else action, windows)

    stages = sorted(own, key=lambda a: (pass_of(a)[1], pass_of(a)[0] is Pass.BACKWARD))
    weighing = [stage for stage in stages if stage.kind is not Kind.PASS]
    found = [] if weights == "whole" else gathers(weighing, layers, once=weights == "renewed")
    after = {gather.action: gather.after for gather in found if gather.after}
    reduces = _reduces(stages, part, windows, weights)
    collectives = {} if part.first else reduces
    for gather, stage in after.items():
        collectives[stage] = [gather, *collectives.get(stage, [])]
    by_pass: dict[_PassOf, list[Action]] = defaultdict(list)
    result = by_pass[pass_of(stages[0])]
    result += [gather.action for gather in found if not gather.after]
    waited: list[Action] = []  # answers that the stages of this layer wait for
    sent: list[Action] = []  # answers to what they sent
    key: object = None
    for action in stages:
        result = by_pass[pass_of(action)]
        between = windows.experts == "between" and action.kind is Kind.ATTENTION
        backward = action.direction is Pass.BACKWARD
        ahead = windows.transfers == "interleaved" or (between and backward)
        due = 1 if ahead else len(waited)
        run = "turn" if turns(action) else (action.kind, action.direction, action.layer)
        if run != key:
            key = run
            waited, sent = waited + sent, []
            due = 2 if ahead else len(waited)
        late = turns(action) and (action.kind, action.direction) != (Kind.PASS, Pass.FORWARD)
        result += _taken(waited, 0 if late else due)
        out = _sent_by(action, part)
        if out:
            result.append(out)
            sent += [out.answer] if out.is_exchange else []
        if between and not backward:
            result += sent[:-1]
            del sent[:-1]
        place = 1 if windows.transfers == "interleaved" else max(1, len(sent) - 1)
        sent[place:place] = collectives.get(action, ())
    result += [*waited, *sent]
    if part.first:
        result += [reduce for found in reduces.values() for reduce in found]
    return by_pass, after if weights == "sharded" else {}


def _pass_of(action: Action, windows: Windows) -> _PassOf:
    return action.direction, action.micro_batch // windows.width


def _times(stages: int, windows: Windows) -> list[dict[_PassOf, tuple[float, float]]]:
    """When every pass of every pipeline stage would start, and how long it would take (_transfer_order); backward ones
    of a validation never do."""
    orders = [
        [[(way, window[0] // windows.width) for way, window in step] for step in steps(s, windows)]
        for s in reversed(range(stages))
    ]
    times: list[dict[_PassOf, tuple[float, float]]] = [{} for _ in orders]
    free = [0.0] * stages
    while any(orders):
        for number, left in enumerate(orders):
            if left and (ready := _ready(times, number, left[0])) < inf:
                step = left.pop(0)
                begins, length = max(free[number], ready), sum(_LENGTH[way] for way, _ in step)
                times[number] |= dict.fromkeys(step, (begins, length))
                free[number] = begins + length
    return times


def _ready(times: Sequence[Mapping[_PassOf, tuple[float, float]]], number: int, step: Sequence[_PassOf]) -> float:
    """When a stage has from those beside it what a step needs; infinite where that is not known yet."""
    result = 0.0
    for key in step:
        beside = number + (1 if key[0] is Pass.BACKWARD else -1)
        if 0 <= beside < len(times):
            result = max(result, sum(times[beside].get(key, (inf, 0.0))))
    return result


def _reduces(
    stages: Order | list[Action], part: Part, windows: Windows, weights: _Weights
) -> dict[Action, list[Action]]:
    """By the stage that it follows: the last backward of a layer, or of every window where only shares are kept. A head
    that is apart goes behind what the last layer's experts wait for."""
    width, layers = windows.width if weights == "sharded" else windows.micro_batches, len(part.hosts)

    def behind(stage: Action) -> Action:
        apart = stage.kind is Kind.HEAD and part.gives
        return stage._replace(kind=Kind.PASS, layer=layers) if apart else stage

    return {
        behind(stage): [Action(Kind.REDUCE, Pass.BACKWARD, segment_of(stage, layers), stage.micro_batch)]
        for stage in stages
        if stage.direction is Pass.BACKWARD and stage.kind is not Kind.PASS and not (stage.micro_batch + 1) % width
    }


def _taken(waited: list[Action], due: int) -> list[Action]:
    """Take the first `due` answers, with the collectives among and right after them."""
    count = 0
    while count < len(waited) and (due or waited[count].is_collective):
        due -= not waited[count].is_collective
        count += 1
    taken, waited[:] = waited[:count], waited[count:]
    return taken


def _sent_by(action: Action, part: Part) -> Action | None:
    """What a rank that attends, or computes the head, sends after a stage."""
    forward, layer, j = action.direction is Pass.FORWARD, action.layer, action.micro_batch
    if action.kind is Kind.ATTENTION and forward:
        return Action(Kind.DISPATCH, Pass.FORWARD, layer, j)
    if (action.kind is Kind.PASS and forward) or (action.kind is Kind.ATTENTION and 0 < layer == part.first):
        return Action(Kind.CROSS, action.direction, layer, j)
    if forward or (action.kind is Kind.ATTENTION and not layer):
        return None
    behind = len(part.hosts) if action.kind is Kind.HEAD else layer
    apart = action.kind is Kind.HEAD and part.gives
    return Action(Kind.CROSS, Pass.BACKWARD, behind, j) if apart else Action(Kind.COMBINE, Pass.BACKWARD, behind - 1, j)
