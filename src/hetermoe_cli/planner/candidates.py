"""Candidates: all choices of the searched space that closed-form bounds leave open."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

import numpy as np

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.bounds import Bounder, Slots
from hetermoe_cli.planner.choice import Choice
from hetermoe_cli.planner.master import Mixture
from hetermoe_cli.planner.space import DEVICE_LEVEL_LIMIT, arrangements, assign, combinations, kinds, schedules, splits


@dataclass
class Candidate:
    """One choice with the best lower bounds known for it, and what is known of its placements.

    `bound` holds for every placement, `alike` for those in which the devices of a class differ by one expert at most.
    """

    bound: float
    choice: Choice
    alike: float = 0.0
    uniform: bool = False  # devices of a kind attend to equal sequences
    mixture: Mixture | None = None
    placed: bool = False


def candidates(cost: CostModel, micro_batch_limit: int, seconds: float) -> tuple[list[Candidate], bool]:
    """Choices that may be faster than `seconds`, and whether all device-level ones were looked at.

    Uniform ones come first, then those with the best bound: the best plan is often among the former.
    """
    members = kinds(cost.devices)
    whole = len(cost.devices) <= DEVICE_LEVEL_LIMIT
    found: list[Candidate] = []
    for schedule in schedules(cost, micro_batch_limit):
        total = cost.train.global_batch_sequences // schedule.micro_batches
        bounder = Bounder(cost, members, schedule, total)
        found += _bounded(bounder, members, total, seconds, whole)
    return sorted(found, key=lambda c: (not c.uniform, c.bound)), whole


def _bounded(bounder: Bounder, members: list[list[int]], total: int, seconds: float, whole: bool) -> list[Candidate]:
    options = []
    for kind, ranks in enumerate(members):
        most = 0
        while most < total and bounder.fits(kind, most + 1) and bounder.attention_load(kind, most + 1) < seconds:
            most += 1
        options.append(splits(total, most, len(ranks), whole=whole))
    rows = combinations(total, options)
    if not rows:
        return []
    bounds = bounder.bounds(_slots(rows, members), seconds if isfinite(seconds) else bounder.ceiling())
    world = len(bounder.cost.devices)
    return [
        Candidate(
            float(bound),
            Choice(bounder.schedule, assign(members, parts, world)),
            float(bound),
            uniform=all(len(set(part)) == 1 for part in parts),
        )
        for bound, parts in zip(bounds, rows, strict=True)
        if bound < inf
    ]


def arranged(cost: CostModel, candidate: Candidate) -> list[Candidate]:
    """The candidate in every way to give its numbers to devices of one kind that the network tells apart."""
    ways = arrangements(cost.devices, candidate.choice.sequences)
    return [replace(candidate, choice=replace(candidate.choice, sequences=sequences)) for sequences in ways]


def _slots(rows: Sequence[tuple[tuple[int, ...], ...]], members: list[list[int]]) -> Slots:
    """One slot per distinct number of sequences in a kind."""
    width = [max(len(set(parts[kind])) for parts in rows) for kind in range(len(members))]
    sequences = np.zeros((len(rows), sum(width)), dtype=np.int64)
    devices = np.zeros_like(sequences)
    for row, parts in enumerate(rows):
        column = 0
        for kind, part in enumerate(parts):
            for offset, value in enumerate(sorted(set(part), reverse=True)):
                sequences[row, column + offset], devices[row, column + offset] = value, part.count(value)
            column += width[kind]
    return Slots(sequences, devices, np.repeat(np.arange(len(members)), width))
