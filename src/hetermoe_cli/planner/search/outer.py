"""Outer search over schedule, R, recompute and sequences: bound all, place well where promising, solve few exactly.

1. Heuristic placements of the most promising choices in which devices of a kind are alike; then closed-form bounds of
   every choice (bounds/closed_form.py): those that cannot beat the best layout so far are dropped.
2. A bound from patterns (bounds/master.py), for the choice with the lowest bound at a time.
3. A heuristic placement, where that bound is still the lowest.
4. A bound from better chains and a placement from its mixture, then MILPs: with classes' means (a bound), of which
   more and more devices are apart, and as it stands; devices of a class alike. Choices take turns, the one with the
   lowest bound first, in shares of the time that double.
5. MILPs over all placements, by classes, with some and with all devices apart, in turns as well.
6. MILPs in the other orders of experts and transfers, which all bounds leave out.
Placements are improved in every order, and the best ones shaken (incumbent.py). The last two steps get what time is
left. Each MILP may only find what beats the best layout so far by the solver's tolerance.
Every step keeps the lower bound of every choice, so that the smallest one bounds the searched space.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from typing import Literal, NamedTuple

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner.bounds.master import mixture
from hetermoe_cli.planner.bounds.patterns import Limits
from hetermoe_cli.planner.instance.choice import ALL, Choice, DeviceClass
from hetermoe_cli.planner.instance.prepared import Prepared
from hetermoe_cli.planner.milp.model import Mode
from hetermoe_cli.planner.search.candidates import Candidate, ExactOver, Listing, arranged
from hetermoe_cli.planner.search.incumbent import Incumbent
from hetermoe_cli.planner.search.runner_up import RunnerUp, best_of_families
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.layout import Layout

MISSES = 12
SHARES = 8  # of the time for the proof: what the first MILP of a choice gets at least
ALONE = 0.75  # of that time, where no other choice presses
AGAIN = 1.5  # times what a MILP had before: with less it would not get further
APART = (1, 2, 3)  # devices of each class with variables of their own, step by step
MORE = 1.0  # of the time until then, at most, for MILPs in other orders
PRESSING = 0.01  # below the best by more than this, a choice's bound makes a gap worth closing


class Stage(NamedTuple):
    """A tighter bound on a choice: from patterns with better chains, or from a MILP over its placements."""

    mode: Mode | Literal["patterns"]
    alike: bool = False
    apart: int = 0  # devices of each class with variables of their own


@dataclass
class Found:
    """Result of a search; `bound` holds for every layout in the default orders of experts and transfers, without
    shifts and with heads where attention is."""

    layout: Layout | None
    seconds: float
    bound: float
    exact_over: ExactOver
    status: str
    candidates: int
    solved: int
    runner_ups: list[RunnerUp] = field(default_factory=list)


@dataclass
class Search(Incumbent):
    """The choices that are open, with what is known of each."""

    open: list[Candidate] = field(default_factory=list)
    rest: float = inf  # lower bound of choices that there was no time to look at
    # seconds that MILPs had so far, infinite where they ended
    had: dict[tuple[Choice, tuple[DeviceClass, ...], Mode, bool], float] = field(default_factory=dict)

    def explore(self) -> None:
        """Steps 2 and 3: pattern bounds and placements, always of the choice with the lowest bound.

        After MISSES placements in a row without gain only bounds are tightened.
        """
        coarse, self.open, misses = self.open, [], 0
        number = count()
        queue = [(c.bound, next(number), c) for c in coarse]
        heapify(queue)
        while queue:
            _, _, candidate = heappop(queue)
            if candidate.bound < self.target and self.left > 0 and not candidate.bounded:
                for one in self._bounded(candidate):
                    heappush(queue, (one.bound, next(number), one))
                continue
            self.open.append(candidate)
            if candidate.bound < self.target and self.left > 0 and misses < MISSES:
                before = self.seconds
                self.place(candidate, Prepared.of(self.cost, candidate.choice))
                misses = misses + 1 if self.seconds == before else 0

    def _bounded(self, coarse: Candidate) -> list[Candidate]:
        """The choice in every arrangement, with its pattern bound."""
        result = arranged(self.cost, coarse)
        for candidate in result:
            candidate.bounded = True
            self._bound(candidate, Prepared.of(self.cost, candidate.choice))
        return result

    def _capped(self, bound: float, horizon: float) -> float:
        """What a bound on placements within `horizon` says of all of them; infinite if there are none at all."""
        if bound < horizon:
            return bound
        return horizon if horizon == self.target else inf

    def _bound(self, candidate: Candidate, ready: Prepared, *, mixed: bool = False) -> None:
        horizon = self.horizon(ready)
        found = mixture(ready.rates, horizon, mixed=mixed)
        if found is not None:
            candidate.bound = max(candidate.bound, self._capped(found.bound, horizon))
            candidate.mixture = found
        candidate.alike = max(candidate.alike, candidate.bound)

    def prove(self) -> None:
        """Step 4: MILPs with devices of a class alike, the most promising choice first."""
        mean, one, *more = (Stage("mean", alike=True, apart=apart) for apart in (0, *APART))
        self._in_turn(lambda c: c.alike, [Stage("patterns"), mean, Stage("largest", alike=True), one, *more])

    def prove_devices(self, whole: bool) -> None:
        """Step 5: MILPs over all placements, by classes (if `whole`), with some and with all devices apart.

        Otherwise only the last, of choices whose classes' means leave a doubt.
        """
        if whole:
            self._in_turn(lambda c: c.bound, [Stage("mean", apart=apart) for apart in (0, *APART, ALL)])
        else:
            self._in_turn(lambda c: c.alike, [Stage("mean", apart=ALL)])

    def _in_turn(self, known: Callable[[Candidate], float], stages: list[Stage]) -> None:
        """Stages of every choice, always of the one with the lowest bound, as that is what the plan's gap is.

        A MILP that does not end in its share of the time starts anew with twice as much when its choice's turn comes
        again: most choices are soon ruled out, and one that is not must not use up the time of the others. The fewer
        matter, the longer the first share; the last one gets all that is left.
        """
        pressing = sum(known(c) < (1 - PRESSING) * self.seconds for c in self.open)
        first = self.left * (ALONE if pressing <= 1 else 1 / min(SHARES, 1 + pressing))
        number = count()
        queue = [(known(c), next(number), c, stages, first) for c in self.open]
        heapify(queue)
        while queue and queue[0][0] < self.target and self.left > 0:
            _, _, candidate, todo, seconds = heappop(queue)
            alone = not queue or queue[0][0] >= self.target
            if self._run(candidate, todo[0], self.left if alone else min(seconds, self.left)):
                todo = todo[1:]
            else:
                seconds *= 2
            if todo:
                heappush(queue, (known(candidate), next(number), candidate, todo, seconds))

    def _run(self, candidate: Candidate, stage: Stage, seconds: float) -> bool:
        """One stage of a choice; whether it has shown all that it can in the time there is."""
        ready = Prepared.of(self.cost, candidate.choice, stage.apart)
        if stage.mode == "patterns":
            self._bound(candidate, ready, mixed=True)
            if candidate.bound < self.target:
                self.place(candidate, ready)  # its mixture is another one
            return True
        if stage.mode == "largest" and ready.single:
            return True  # as the mean
        problem = ready.choice, tuple(ready.classes), stage.mode, stage.alike and not ready.single
        if seconds < AGAIN * self.had.get(problem, 0.0):
            return True  # as far as it gets; or there was no more to take apart
        bound, done = self._solve(candidate, ready, stage.mode, stage.alike, seconds)
        self.had[problem] = inf if done else seconds
        if stage.mode == "mean":
            candidate.alike = max(candidate.alike, bound)
            if ready.single or not stage.alike:
                candidate.bound = max(candidate.bound, bound)
        return done

    def _solve(
        self, candidate: Candidate, ready: Prepared, mode: Mode, alike: bool, seconds: float
    ) -> tuple[float, bool]:
        """One MILP for what beats the best by the tolerance; the lower bound that it proves, and whether it ended."""
        horizon = self.horizon(ready)
        found = mixture(ready.rates, horizon, mixed=True)  # limits get tighter as the target falls
        if found is not None and found.bound >= horizon:
            return self._capped(found.bound, horizon), True
        limits = found.limits if found else Limits.of(ready.rates, horizon)
        if alike:
            limits = limits.alike(ready.rates)
        run, counts = self.milp(ready, mode, limits, seconds)
        bound = self._capped(run.bound, horizon)  # before the target moves
        if counts is not None:
            self.offer_counts(candidate, ready, counts)
        return bound, run.status in ("optimal", "infeasible") or run.seconds < seconds / 2

    def found(self, scope: ExactOver) -> Found:
        """What the search has shown so far."""
        exact: ExactOver
        devices = min([c.bound for c in self.open] + [self.seconds, self.rest])
        classes = min([c.alike for c in self.open] + [self.seconds, self.rest])
        if devices >= self.target and scope == "devices":
            exact, bound = "devices", devices
        elif classes >= self.target and scope != "not solved":
            exact, bound = "classes", classes
        else:
            exact, bound = "not solved", devices if scope == "devices" else classes
        unbounded = bool(self.best and self.best.beyond_bounds)
        status = "feasible" if unbounded or exact == "not solved" else "optimal"
        losers = [r for r in best_of_families(self.offered) if r.layout is not self.best]
        return Found(self.best, self.seconds, bound, exact, status, len(self.open), self.solved, losers)


def search(
    cost: CostModel,
    options: SolverOptions,
    micro_batch_limit: int,
    incumbents: Sequence[Layout | None],
    progress: Callable[[str], None] = lambda text: None,
    *,
    heads: bool = True,
) -> Found:
    """The fastest layout; never slower than any incumbent that fits. `heads`: some may have the head apart, which
    bounds on several groups do not cover."""
    began = time.monotonic()
    end = began + options.time_limit
    state = Search(cost, options, end)
    for layout in incumbents:
        state.offer(layout)
    progress("bounding")
    listing = Listing(cost, micro_batch_limit, state.seconds)
    state.seed(listing.uniform)
    space = listing.space(state.seconds, time.monotonic() + options.time_limit / 4)
    state.open, state.rest, scope = space.candidates, space.rest, space.scope
    state.deadline = (time.monotonic() + end) / 2  # leave time for the proof
    state.explore()
    state.reorder(state.open)
    state.shake(time.monotonic() - began)
    state.deadline = end
    spent = time.monotonic() - began
    state.relieve(spent, micro_batch_limit)
    if heads:
        state.lend(spent)
    progress("proving")
    state.prove()
    state.prove_devices(scope == "devices")
    now = time.monotonic()
    state.refine(now + (now - began) * MORE)
    return state.found(scope)
