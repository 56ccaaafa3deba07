"""Borders: what happens between two layers, and how long a layer takes from each of it to each of the next.

Seconds per pattern, from the edges of the task graph; a pair that is missing has no path. For the fullest device of a
class where one device decides, for the mean of a class on its own stream (a sum over its devices). A device that hosts
nothing in a layer is on its class's stream as if it had waited for the layer's first message.

                forward, before a layer              backward, before a layer (after the attention of the one above)
FIRST           end of the first combine above       start of the layer's first combine
LAST            end of the last combine above        end of the last dispatch of the layer above
PORT            the same, where the next answers wait for it on their lane, or messages on a link that they share with
                hosts of their own layer; before layer 0 nothing waits, so that it is when the first messages can go out
HELD            the same, where they wait for it on a link that hosts of the layer above share with them
EARLY                                                start of the layer's last combine
REDUCED                                              end of the all-reduce of the layer two above (last window only)
CREDIT                                               the same, and the replicated experts' part of the next all-reduce
STREAM + c      class c is done with the layer above

Where all of a layer is replicated there are no messages. FIRST, LAST and EARLY are then about the stream of one
attending class; with several of them it is not known which, so that chains stay what they are.
"""

from enum import IntEnum

import numpy as np

from hetermoe_cli.planner.arrays import FloatArray, choose, largest
from hetermoe_cli.planner.bounds.sides import Side


class Border(IntEnum):
    """Events that are not of one class."""

    FIRST = 0
    LAST = 1
    PORT = 2
    HELD = 3
    EARLY = 4
    REDUCED = 5
    CREDIT = 6
    STREAM = 7


FIRST, LAST, PORT, HELD, EARLY, REDUCED, CREDIT, STREAM = Border
SAME = (LAST, PORT, HELD)
Times = dict[tuple[int, int], FloatArray]
NONE = -np.inf


class Layer:
    """Collects the longest ways of a layer that has hosts, then those of a replicated one."""

    def __init__(self, side: Side) -> None:
        self.side, self.times = side, Times()
        self.none: FloatArray = np.full(len(side.d), NONE)

    def add(self, before: int, after: int, *ways: FloatArray | float) -> None:
        """Ways from one event to the other."""
        known = self.times.get((before, after), self.none)
        self.times[before, after] = largest([known, *(way + 0.0 * self.side.d for way in ways)])

    def inherit(self, earlier: int, later: int, apart: FloatArray | float = 0.0) -> None:
        """What happens `earlier` comes before what happens `later`, by `apart` at least."""
        for (before, after), way in list(self.times.items()):
            if before == later:
                self.add(earlier, after, way + apart)

    def finish(self, replicated: Times) -> Times:
        """The ways, in a replicated layer those of `replicated` and no others."""
        return {
            pair: choose(self.side.any, self.times.get(pair, self.none), replicated.get(pair, self.none))
            for pair in {*self.times, *replicated}
        }


def alias(side: Side, times: Times) -> Times:
    """LAST, PORT and HELD are one moment; of a layer whose links others share it is HELD as well."""
    contended, more = side.patterns.contended, Times()
    for (before, after), way in times.items():
        if after == LAST:
            more |= {(before, PORT): way, (before, HELD): choose(contended, way, NONE)}
    return times | more
