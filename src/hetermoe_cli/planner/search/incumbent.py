"""Incumbent: the fastest layout so far, and what looks for a faster one: placements in every order, and MILPs.

Bounds are of the default order of experts and transfers. Often another one is faster, by up to 4 % where attending
devices host, and what is best in one order need not be in another; so every promising choice is placed in all of them.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.arrays import IntArray
from hetermoe_cli.planner.bounds.patterns import Limits
from hetermoe_cli.planner.instance.choice import ALL, Choice, DeviceClass
from hetermoe_cli.planner.instance.counts import Counts, counts_of, table_of
from hetermoe_cli.planner.instance.prepared import Prepared
from hetermoe_cli.planner.instance.rates import Rates
from hetermoe_cli.planner.milp import problem as milp
from hetermoe_cli.planner.milp.model import Mode
from hetermoe_cli.planner.orders import other_orders, other_schedules
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.planner.search import heuristic
from hetermoe_cli.planner.search.candidates import Candidate
from hetermoe_cli.planner.search.heads import with_heads
from hetermoe_cli.planner.search.runner_up import RunnerUp
from hetermoe_cli.planner.search.shake import shaken
from hetermoe_cli.planner.search.shifts import with_shifts
from hetermoe_cli.planner.solver import Run, SolverOptions
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.layout import Layout

NEAR = 1.04  # times the best: what another order may still make the best
SEEDS = 6  # choices in which devices of a kind are alike, placed first: the best of those that are looked at
LOOK = 8  # for at most one part in so many of the time
REORDER = 4  # and what further placements in other orders get
SHAKEN = 6  # choices, in any order, whose best placements are shaken
CLIMBS = 32  # of each
SHAKE = 4  # for at most one part in so many of the time that is left
AS_LONG = 1.0  # times what the search took so far, at most: small problems are soon solved
LITTLE = 3.0  # seconds
RELIEVE = 2  # for at most one part in so many of the time that is left
ORDERS = 4  # that MILPs take up: choices in orders other than the default
REFINED = (0, 2, ALL)  # devices of each class with variables of their own, step by step
SHARE = 0.7  # of the time that is left for these, what each may take
WORTH = 1.0  # seconds: with less none is begun


@dataclass
class Incumbent:
    """State of one search; `best` is the fastest layout replayed so far."""

    cost: CostModel
    options: SolverOptions
    deadline: float
    best: Layout | None = None
    seconds: float = inf
    solved: int = 0
    offered: list[RunnerUp] = field(default_factory=list)
    placed: dict[Choice, tuple[float, Layout]] = field(default_factory=dict)  # the fastest layout of each, in its order

    @property
    def target(self) -> float:
        """What a choice must be able to beat to be worth a look."""
        return self.seconds * (1 - self.options.relative_gap)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def horizon(self, ready: Prepared) -> float:
        """What a placement may take to be of interest."""
        return min(self.target, ready.rates.serial)

    def offer(self, layout: Layout | None) -> float:
        """Keep `layout` if it fits and its replay is the fastest; the seconds of its replay, infinite if it does not
        fit."""
        if layout is None:
            return inf
        layout_cost = LayoutCost(self.cost, layout)
        if overflow(layout_cost) is not None:
            return inf
        seconds = simulate(layout_cost).seconds
        tried = [(layout, seconds)]
        if seconds < NEAR * self.seconds:
            tried += other_orders(layout_cost)
        for one, replayed in tried:
            self.offered.append(RunnerUp.of(self.cost, one, replayed))
            choice = Choice(one.schedule, tuple(one.sequences_per_rank))
            plain = not one.shifts and not one.head
            if plain and (choice not in self.placed or replayed < self.placed[choice][0]):
                self.placed[choice] = replayed, one
            if replayed < self.seconds:
                self.best, self.seconds = one, replayed
        return seconds

    def seed(self, uniform: Sequence[Candidate]) -> None:
        """Placements of the choices whose levelled shares of experts are fastest as they are.

        The best plan is often among them, and a good one spares other choices their bounds.
        """
        end = time.monotonic() + self.left / LOOK
        found: list[tuple[float, int, Candidate, Prepared]] = []
        for number, candidate in enumerate(uniform):
            if number >= SEEDS and time.monotonic() > end:
                break
            ready = Prepared.of(self.cost, candidate.choice)
            times = heuristic.evaluate(ready.rates, ready.tasks, self._starts(candidate, ready))
            found.append((float(times.min()), number, candidate, ready))
        for _, _, candidate, ready in sorted(found)[:SEEDS]:
            if self.left > 0:
                self.place(candidate, ready)

    def place(self, candidate: Candidate, ready: Prepared) -> None:
        """A good placement of a choice, in the other orders as well if it is near the best."""
        starts = self._starts(candidate, ready)
        table = heuristic.improve(ready.rates, ready.tasks, starts, self.seconds, self.deadline)
        if table is not None:
            self.offer_counts(candidate, ready, counts_of(ready.rates, table), starts)

    def offer_counts(
        self, candidate: Candidate, ready: Prepared, counts: Counts, starts: IntArray | None = None
    ) -> None:
        """A placement of a choice; if it is near the best, what other orders make of it, and of `starts`."""
        if self.offer(ready.layout(counts)) < NEAR * self.seconds:
            table = table_of(ready.rates, counts)[None]
            self._reorder(candidate, ready, table if starts is None else np.concatenate([table, starts]))

    def reorder(self, candidates: Sequence[Candidate]) -> None:
        """Placements for the other orders of choices that may be near the best, for at most a part of the time."""
        end = time.monotonic() + self.left / REORDER
        for candidate in sorted(candidates, key=lambda c: c.bound):
            if candidate.bound > NEAR * self.seconds or time.monotonic() > end:
                break
            if not candidate.reordered:
                ready = Prepared.of(self.cost, candidate.choice)
                self._reorder(candidate, ready, self._starts(candidate, ready))

    def _reorder(self, candidate: Candidate, ready: Prepared, starts: IntArray) -> None:
        candidate.reordered = True
        for schedule in other_schedules(ready.choice.schedule):
            if self.left <= 0:
                return
            choice = replace(ready.choice, schedule=schedule)
            other = Prepared(choice, ready.classes, Rates(self.cost, choice, ready.classes))
            table = heuristic.improve(other.rates, other.tasks, starts, self.seconds, self.deadline)
            if table is not None:
                self.offer(other.layout(counts_of(other.rates, table)))

    def shake(self, spent: float) -> None:
        """Further climbs from around the best placements that `spent` seconds of search found, for at most a part of
        the time."""
        end = time.monotonic() + min(self.left / SHAKE, AS_LONG * spent)
        for choice in self._fastest(self.placed)[:SHAKEN]:
            ready = Prepared.of(self.cost, choice)
            table = heuristic.table_in(ready.classes, self.placed[choice][1])
            better = shaken(ready.rates, ready.tasks, table, CLIMBS, end)
            self.offer(ready.layout(counts_of(ready.rates, better)))

    def relieve(self, spent: float, micro_batch_limit: int) -> None:
        """Layouts in which hosts attend in shifts, for at most as long as `spent` seconds of search, if that is not
        very little, and a part of the time."""
        seconds = min(self.left / RELIEVE, max(LITTLE, AS_LONG * spent))
        bases = [base for _, base in sorted(self.placed.values(), key=lambda pair: pair[0])]
        if seconds > 0:
            for layout in with_shifts(self.cost, bases, self.seconds, seconds, micro_batch_limit):
                self.offer(layout)

    def lend(self, spent: float) -> None:
        """Layouts in which other ranks than those that attend compute the head, in as much time as `relieve`."""
        seconds = min(self.left / RELIEVE, max(LITTLE, AS_LONG * spent))
        bases = [base for _, base in sorted(self.placed.values(), key=lambda pair: pair[0])]
        if self.best and self.best.shifts:
            bases = [self.best, *bases]
        if seconds > 0:
            for layout in with_heads(self.cost, bases, self.seconds, seconds):
                self.offer(layout)

    def _fastest(self, choices: Iterable[Choice]) -> list[Choice]:
        """Those whose best placements are near the best of all, in their order."""
        near = [choice for choice in choices if self.placed[choice][0] < NEAR * self.seconds]
        return sorted(near, key=lambda choice: self.placed[choice][0])

    def refine(self, end: float) -> None:
        """MILPs in the orders without bounds, for what they find, until `end` (time.monotonic): with more and more
        devices of a class apart, orders with the best placements first."""
        ended: set[tuple[Choice, tuple[DeviceClass, ...]]] = set()
        for apart in REFINED:
            others = [choice for choice in self.placed if not choice.schedule.in_default_order]
            for choice in self._fastest(others)[:ORDERS]:
                left = min(self.deadline, end) - time.monotonic()
                if left < WORTH:
                    break
                ready = Prepared.of(self.cost, choice, apart)
                if (problem := (choice, tuple(ready.classes))) in ended:
                    continue  # there was no more to take apart
                limits = Limits.of(ready.rates, self.horizon(ready)).alike(ready.rates)
                run, counts = self.milp(ready, "largest", limits, SHARE * left)
                if run.status in ("optimal", "infeasible"):
                    ended.add(problem)
                if counts is not None:
                    self.offer(ready.layout(counts))

    def milp(self, ready: Prepared, mode: Mode, limits: Limits, seconds: float) -> tuple[Run, Counts | None]:
        """A MILP for what beats the best by the tolerance: what it proved, and what it found."""
        model = milp.build(ready.rates, ready.graph, self.horizon(ready), mode, limits)
        options = SolverOptions(self.options.name, max(0.1, seconds), self.options.relative_gap / 4, mode != "mean")
        run = milp.solve(model, options)
        self.solved += 1
        return run, milp.extract(model) if run.status in ("optimal", "feasible") else None

    def _starts(self, candidate: Candidate, ready: Prepared) -> IntArray:
        return heuristic.starts(ready.rates, candidate.mixture, self.horizon(ready))
