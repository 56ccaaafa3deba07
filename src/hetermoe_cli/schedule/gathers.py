"""When weights are gathered from those that stepped shares of them: one stage ahead of use.

A segment is what is gathered at once: a layer's weights, the embedding with layer 0, or norm and head. Where optimizer
states alone are shared out, weights stay whole: new ones come once an iteration. Where the dense part is fully sharded,
its segment at work and the next one are whole, never more: what comes next is gathered when the segment before the one
at work is dropped. What is needed again right after the one at work (the last layer around the head, layer 1 around
layer 0 between two windows) stays.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.schedule.schedule import Schedule, gather_for, segment_of


class Gather(NamedTuple):
    """A gather, and the last stage before those that run ahead of its use (None: there is none)."""

    action: Action
    after: Action | None


def gathers(stages: Iterable[Action], layers: int, *, once: bool) -> list[Gather]:
    """Of all attention and head tasks of an attending rank, in order; `once`: weights stay whole."""
    uses = [list(use) for _, use in groupby(stages, key=lambda stage: segment_of(stage, layers))]
    result, known = [], set[int]()
    for place, use in enumerate(uses):
        before, segment = uses[place - 2][-1] if place > 1 else None, segment_of(use[0], layers)
        stays = segment in known if once else before is not None and segment_of(before, layers) == segment
        if not stays:
            result.append(Gather(gather_for(use[0], layers), before))
        known.add(segment)
    return result


def releases(schedule: Schedule, order: Sequence[Action], layers: int) -> dict[Action, int]:
    """After which tasks of a rank's `order` a segment is not needed until it is gathered again, or not at all."""
    result: dict[Action, int] = {}
    last: dict[int, Action] = {}
    for stage in order:
        if stage.kind in (Kind.ATTENTION, Kind.HEAD):
            segment = segment_of(stage, layers)
            if segment in last and gather_for(stage, layers) in schedule.senders:
                result[last[segment]] = segment
            last[segment] = stage
    return result | {stage: segment for segment, stage in last.items()}
