"""Shaken climbs: a placement is changed at random in a few layers and climbed again, as one climb ends early.

Iterated local search (Lourenço, Martin and Stützle, 2003): what a climb reaches is shaken next where it is about as
fast as what it came from.
"""

import time
from math import inf

import numpy as np

from hetermoe_cli.planner.arrays import IntArray
from hetermoe_cli.planner.instance.graph import TaskGraph
from hetermoe_cli.planner.instance.rates import Rates
from hetermoe_cli.planner.search.heuristic import climb, evaluate, moves_of

TRIALS = 64  # shaken placements, of which the best one is climbed
CHANGES = (2, 5)  # fewest and most in a shaken placement
NEAR = 1.001  # times what was shaken: as good to go on from
RETURN = 0.1  # how often it goes on from the best one instead of staying


def shaken(rates: Rates, graph: TaskGraph, table: IntArray, climbs: int, deadline: float = inf) -> IntArray:
    """The best placement [layers, classes + 1] that `climbs` climbs from around `table` find, begun by `deadline`."""
    draw, moves = np.random.default_rng(0), moves_of(rates)
    here = float(evaluate(rates, graph, table[None])[0])
    at, best, least = table, table, here
    for _ in range(climbs):
        if time.monotonic() > deadline:
            break
        trials = np.array([_changed(draw, at, moves) for _ in range(TRIALS)])
        times = evaluate(rates, graph, trials)
        first = int(times.argmin())
        reached, climbed = climb(rates, graph, moves, trials[first], float(times[first]), deadline)
        if reached < least:
            least, best = reached, climbed
        if reached < NEAR * here:
            here, at = reached, climbed
        elif draw.random() < RETURN:
            here, at = least, best
    return best


def _changed(draw: np.random.Generator, table: IntArray, moves: IntArray) -> IntArray:
    """Layers exchanged, the pattern of one given to another, experts moved."""
    table, layers = table.copy(), len(table)
    for _ in range(draw.integers(CHANGES[0], CHANGES[1] + 1)):
        first, second = draw.integers(layers, size=2)
        match draw.integers(5):
            case 0:
                table[[first, second]] = table[[second, first]]
            case 1:
                table[first] = table[second]
            case _:
                moved = table + moves[draw.integers(len(moves))]
                if (moved >= 0).all():
                    table = moved
    return table
