"""Candidates: all choices of the searched space that closed-form bounds leave open."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import inf, isfinite
from typing import Literal

import numpy as np

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.arrays import IntArray
from hetermoe_cli.planner.bounds.closed_form import Bounder, Slots
from hetermoe_cli.planner.bounds.master import Mixture
from hetermoe_cli.planner.bounds.work import work_bound
from hetermoe_cli.planner.instance.choice import Choice
from hetermoe_cli.planner.search.space import (
    DEVICE_LEVEL_LIMIT,
    MOST_COMBINATIONS,
    arrangements,
    assign,
    combinations,
    count_combinations,
    count_whole,
    kinds,
    schedules,
    splits,
)

ExactOver = Literal["devices", "classes", "not solved"]
SCOPES: list[ExactOver] = ["devices", "classes", "not solved"]
AT_ONCE = 20_000  # combinations: a few tenths of a second
Options = list[list[tuple[int, ...]]]


@dataclass
class Candidate:
    """One choice with the best lower bounds known for it, and what is known of its placements.

    `bound` holds for every placement, `alike` for those in which the devices of a class differ by one expert at most.
    """

    bound: float
    choice: Choice
    alike: float = 0.0
    uniform: bool = False  # devices of a kind attend to equal sequences
    bounded: bool = False  # by patterns; arranged in the network
    reordered: bool = False  # placed in the other orders
    mixture: Mixture | None = None


@dataclass
class Space:
    """Choices; over what they are all ("not solved": not even over classes); a bound on those left out for time."""

    candidates: list[Candidate]
    scope: ExactOver
    rest: float = inf


class Listing:
    """All choices in two steps: `uniform` ones by their bounds, then the others, most of which a layout that is found
    between the two leaves out."""

    def __init__(self, cost: CostModel, micro_batch_limit: int, seconds: float) -> None:
        """Uniform choices that may be faster than `seconds`."""
        self._cost, self._limit, self._members = cost, micro_batch_limit, kinds(cost.devices)
        self._divided: list[tuple[Bounder, Options]] = []
        self._scope: ExactOver = "devices" if len(cost.devices) <= DEVICE_LEVEL_LIMIT else "classes"
        found: list[Candidate] = []
        for schedule in schedules(cost, micro_batch_limit):
            total = cost.train.global_batch_sequences // schedule.micro_batches
            bounder = Bounder(cost, self._members, schedule, total)
            limits = [_most(bounder, kind, seconds) for kind in range(len(self._members))]
            sizes = list(zip(limits, map(len, self._members), strict=True))
            whole = len(cost.devices) <= DEVICE_LEVEL_LIMIT and count_whole(total, sizes) <= MOST_COMBINATIONS
            options, level = _options(total, sizes, whole)
            self._scope = max(self._scope, level, key=SCOPES.index)
            found += chain.from_iterable(_bounded(bounder, self._members, _undivided(options), seconds, uniform=True))
            if level != "not solved":
                self._divided.append((bounder, options))
        self.uniform = sorted(found, key=lambda c: c.bound)

    def space(self, seconds: float, deadline: float = inf) -> Space:
        """All choices that may be faster than `seconds`; what is not looked at by `deadline` (time.monotonic) is left
        out."""
        found, scope, rest = [c for c in self.uniform if c.bound < seconds], self._scope, inf
        others = (
            _bounded(bounder, self._members, options, seconds, uniform=False) for bounder, options in self._divided
        )
        for some in chain.from_iterable(others):
            found += some
            if time.monotonic() > deadline:
                scope, rest = "not solved", work_bound(self._cost, self._limit)
                break
        return Space(sorted(found, key=lambda c: c.bound), scope, rest)


def _most(bounder: Bounder, kind: int, seconds: float) -> int:
    """Most sequences that a device of the kind can attend to in memory and in less than `seconds`."""
    most = 0
    while most < bounder.total and bounder.fits(kind, most + 1) and bounder.attention_load(kind, most + 1) < seconds:
        most += 1
    return most


def _options(total: int, sizes: list[tuple[int, int]], whole: bool) -> tuple[Options, ExactOver]:
    """Splits of every kind; of kinds with too many combinations only the undivided ones."""
    capacity = sum(most * devices for most, devices in sizes)
    options = [
        splits(total, total - (capacity - most * devices), most, devices, whole=whole) for most, devices in sizes
    ]
    if whole or count_combinations(total, _sums(options)) <= 10 * MOST_COMBINATIONS:
        return options, "devices" if whole else "classes"
    return _undivided(options), "not solved"


def _undivided(options: Options) -> Options:
    return [[part for part in parts if len(set(part)) == 1] for parts in options]


def _sums(options: Options) -> list[IntArray]:
    return [np.array([sum(part) for part in parts], dtype=np.int64) for parts in options]


def _bounded(
    bounder: Bounder, members: list[list[int]], options: Options, seconds: float, *, uniform: bool
) -> Iterator[list[Candidate]]:
    """Those of the choices that may be faster than `seconds`: the uniform ones, or all others, some at a time."""
    if not all(options):
        return
    rows = combinations(bounder.total, _sums(options))
    undivided = [np.array([len(set(part)) == 1 for part in parts]) for parts in options]
    rows = rows[np.all([alike[rows[:, kind]] for kind, alike in enumerate(undivided)], axis=0) == uniform]
    ceiling = seconds if isfinite(seconds) else bounder.ceiling()
    world = len(bounder.cost.devices)
    for first in range(0, len(rows), AT_ONCE):
        some = rows[first : first + AT_ONCE]
        bounds = bounder.bounds(_slots(some, options), ceiling)
        parts = [
            (float(bounds[row]), [option[index] for option, index in zip(options, some[row], strict=True)])
            for row in np.flatnonzero(np.isfinite(bounds))
        ]
        yield [
            Candidate(bound, Choice(bounder.schedule, assign(members, part, world)), bound, uniform)
            for bound, part in parts
        ]


def arranged(cost: CostModel, candidate: Candidate) -> list[Candidate]:
    """The candidate in every way to give its numbers to devices of one kind that the network tells apart."""
    ways = arrangements(cost.devices, candidate.choice.sequences)
    return [replace(candidate, choice=replace(candidate.choice, sequences=sequences)) for sequences in ways]


def _slots(rows: IntArray, options: Sequence[Sequence[tuple[int, ...]]]) -> Slots:
    """One slot per distinct number of sequences in a kind, by falling numbers."""
    sequences, devices, widths = [], [], []
    for kind, parts in enumerate(options):
        counted = [Counter(part) for part in parts]
        width = max(map(len, counted))
        values, counts = (np.zeros((len(parts), width), dtype=np.int64) for _ in range(2))
        for index, part in enumerate(counted):
            values[index, : len(part)], counts[index, : len(part)] = list(part), list(part.values())
        sequences.append(values[rows[:, kind]])
        devices.append(counts[rows[:, kind]])
        widths.append(width)
    return Slots(np.hstack(sequences), np.hstack(devices), np.repeat(np.arange(len(options)), widths))
