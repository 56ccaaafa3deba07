"""Cuts: what the constraints imply anyway, said without big-M so that the relaxation knows it.

Of layers that have hosts (`empty` = 0). h = hosted experts of the fullest device of a class, y = whether it hosts;
where it does not, each cut says less than a dispatch or combine that exists. The fullest device of a class of several
has no tasks of its own in the model: its cuts start from transfers, which all devices share.
"""

from collections.abc import Iterator
from typing import Any

import pulp

from hetermoe_cli.planner.milp.model import Model
from hetermoe_cli.schedule.action import Action, Kind, Pass


def add_cuts(model: Model) -> None:
    """Add all cuts, window by window."""
    schedule = model.rates.choice.schedule
    if not model.transfers:
        return
    firsts = range(0, schedule.micro_batches, schedule.window)
    windows = [range(first, first + schedule.window) for first in firsts]
    for layer in model.layers:
        relief = _empty(model, layer)
        found = [cut for window in windows for cut in _layer(model, layer, window)]
        for number, (later, earlier) in enumerate(found):
            model.problem += later + relief >= earlier, f"cut_{layer}_{number}"


def _empty(model: Model, layer: int) -> Any:
    """1 where all experts of the layer are replicated."""
    experts = model.rates.experts
    if model.limits.most[-1] < experts:
        return 0.0
    empty = model.problem.add_variable(f"empty_{layer}", 0, 1, pulp.LpInteger)
    model.problem += experts * empty <= model.replicated[layer], f"empty_{layer}"
    return empty


def _layer(model: Model, layer: int, window: range) -> Iterator[tuple[Any, Any]]:
    for c, device_class in model.classes:
        yield from _streams(model, layer, c, window)
        if device_class.attends and model.rates.choice.schedule.experts == "after":
            if layer or not window[0]:
                yield from _forward(model, layer, c, window)
            if layer or window.stop == model.rates.choice.schedule.micro_batches:
                yield from _backward(model, layer, c, window)


def _time(model: Model, kind: Kind, way: Pass, layer: int, micro_batch: int, *, end: bool) -> Any:
    """Start or end of a transfer."""
    start = model.start[model.transfers[Action(kind, way, layer, micro_batch)]]
    return start + model.transfer[layer] if end else start


def _streams(model: Model, layer: int, c: int, window: range) -> Iterator[tuple[Any, Any]]:
    """From the first transfer of a layer to its hosts, through E of all micro-batches, to the last one back."""
    for way, there, back in ((Pass.FORWARD, Kind.DISPATCH, Kind.COMBINE), (Pass.BACKWARD, Kind.COMBINE, Kind.DISPATCH)):
        each = model.rates.of[c].hosted[int(way is Pass.BACKWARD)] * len(window)
        first = _time(model, there, way, layer, window[0], end=True)
        yield _time(model, back, way, layer, window[-1], end=False), first + each * model.hosted[layer, c]


def _forward(model: Model, layer: int, c: int, window: range) -> Iterator[tuple[Any, Any]]:
    """A of one and E of all micro-batches up to the last combine; A of all and E of one up to the first."""
    n, r = len(window), model.rates.of[c]
    attention = r.stage(layer, 0)
    hosted, hosts = model.hosted[layer, c], model.hosts[layer, c]
    last = _time(model, Kind.COMBINE, Pass.FORWARD, layer, window[-1], end=False)
    first = _time(model, Kind.COMBINE, Pass.FORWARD, layer, window[0], end=False)
    before_last: Any = (n - 1) * attention
    before_first: Any = 0.0
    if layer:
        before_last = _time(model, Kind.COMBINE, Pass.FORWARD, layer - 1, window[-1], end=True)
        before_first = _time(model, Kind.COMBINE, Pass.FORWARD, layer - 1, window[0], end=True)
    yield last, before_last + attention + n * r.hosted[0] * hosted
    yield first, before_first + attention + (n - 1) * attention * hosts + r.hosted[0] * hosted


def _backward(model: Model, layer: int, c: int, window: range) -> Iterator[tuple[Any, Any]]:
    """E of all and A of one micro-batch from the first combine; E of one and A of all from the last."""
    n, r = len(window), model.rates.of[c]
    attention = r.stage(layer, 1)
    hosted, hosts = model.hosted[layer, c], model.hosts[layer, c]
    first = _time(model, Kind.COMBINE, Pass.BACKWARD, layer, window[0], end=True)
    last = _time(model, Kind.COMBINE, Pass.BACKWARD, layer, window[-1], end=True)
    after_first: Any = model.finish - (n - 1) * attention
    after_last: Any = model.finish
    if layer:
        after_first = _time(model, Kind.COMBINE, Pass.BACKWARD, layer - 1, window[0], end=False)
        after_last = _time(model, Kind.COMBINE, Pass.BACKWARD, layer - 1, window[-1], end=False)
    yield after_first, first + n * r.hosted[1] * hosted + attention
    yield after_last, last + r.hosted[1] * hosted + attention + (n - 1) * attention * hosts
