"""Outer search over schedule, R, recompute and sequences: bound all, place well where promising, solve few exactly.

1. Closed-form bounds of every choice (bounds.py); those that cannot beat the best layout so far are dropped.
2. A bound from patterns (master.py), and where that is among the best a heuristic placement.
3. More placements, in order of the better bounds, while that helps.
4. MILPs, most promising first: with classes' means (a bound), then as it stands; devices of a class alike.
5. MILPs over all placements, by classes and with one class per device.
Each MILP may only find what beats the best layout so far by the solver's tolerance.
Every step keeps the lower bound of every choice, so that the smallest one bounds the searched space.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner import heuristic, ilp
from hetermoe_cli.planner.candidates import Candidate, ExactOver, arranged, candidates
from hetermoe_cli.planner.master import mixture
from hetermoe_cli.planner.patterns import Limits
from hetermoe_cli.planner.prepared import Prepared
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.plan import Layout

NEAR = 1.01  # a bound this close to the lowest one so far makes a choice worth placing at once
MISSES = 5


@dataclass
class Found:
    """Result of a search; `bound` holds for every layout of the searched space."""

    layout: Layout | None
    seconds: float
    bound: float
    exact_over: ExactOver
    status: str
    candidates: int
    solved: int


@dataclass
class Search:
    """State of one search; `best` is the fastest layout replayed so far."""

    cost: CostModel
    options: SolverOptions
    deadline: float
    best: Layout | None = None
    seconds: float = inf
    solved: int = 0
    open: list[Candidate] = field(default_factory=list)

    @property
    def target(self) -> float:
        """What a choice must be able to beat to be worth a look."""
        return self.seconds * (1 - self.options.relative_gap)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def offer(self, layout: Layout | None) -> None:
        """Keep `layout` if it fits and its replay is the fastest."""
        if layout is None:
            return
        layout_cost = LayoutCost(self.cost, layout)
        if overflow(layout_cost) is None and (seconds := simulate(layout_cost).seconds) < self.seconds:
            self.best, self.seconds = layout, seconds

    def bound(self) -> None:
        """Step 2: pattern bounds, and placements where a bound is among the best so far."""
        lowest, looked = inf, []
        for coarse in self.open:
            dropped = coarse.bound >= self.target or self.left < 0
            for candidate in [coarse] if dropped else arranged(self.cost, coarse):
                looked.append(candidate)
                if candidate.bound >= self.target or self.left < 0:
                    continue
                ready = Prepared.of(self.cost, candidate.choice)
                self._bound(candidate, ready)
                if candidate.bound < min(self.target, NEAR * lowest):
                    lowest = min(lowest, candidate.bound)
                    self._place(candidate, ready)
        self.open = looked

    def _horizon(self, ready: Prepared) -> float:
        return min(self.target, ready.rates.serial)

    def _capped(self, bound: float, horizon: float) -> float:
        """What a bound on placements within `horizon` says of all of them; infinite if there are none at all."""
        if bound < horizon:
            return bound
        return horizon if horizon == self.target else inf

    def _bound(self, candidate: Candidate, ready: Prepared) -> None:
        horizon = self._horizon(ready)
        found = mixture(ready.rates, horizon)
        if found is not None:
            candidate.bound = max(candidate.bound, self._capped(found.bound, horizon))
            candidate.mixture = found
        candidate.alike = max(candidate.alike, candidate.bound)

    def place(self) -> None:
        """Step 3: more placements, the most promising choice first, while that helps."""
        misses = 0
        for candidate in sorted(self.open, key=lambda c: c.bound):
            if candidate.placed or candidate.bound >= self.target or self.left < 0:
                continue
            before = self.seconds
            self._place(candidate, Prepared.of(self.cost, candidate.choice))
            misses = misses + 1 if self.seconds == before else 0
            if misses == MISSES:
                break

    def _place(self, candidate: Candidate, ready: Prepared) -> None:
        candidate.placed = True
        starts = heuristic.starts(ready.rates, candidate.mixture, self._horizon(ready))
        counts = heuristic.improve(ready.rates, ready.graph, starts, self.seconds)
        if counts is not None:
            self.offer(ready.layout(counts))

    def prove(self) -> None:
        """Step 4: MILPs with devices of a class alike, the most promising choice first."""
        for candidate in sorted(self.open, key=lambda c: c.alike):
            if candidate.alike >= self.target or self.left < 0:
                continue
            ready = Prepared.of(self.cost, candidate.choice)
            bound = self._solve(candidate, ready, "mean", alike=True)
            candidate.alike = max(candidate.alike, bound)
            if ready.single:
                candidate.bound = max(candidate.bound, bound)
            elif candidate.alike < self.target:
                self._solve(candidate, ready, "largest", alike=True)

    def prove_devices(self, whole: bool) -> None:
        """Step 5: MILPs over all placements, by classes (if `whole`), and with one class per device.

        Otherwise only of choices whose classes' means leave a doubt.
        """
        for candidate in sorted(self.open, key=lambda c: c.bound if whole else c.alike):
            for per_device in (False, True) if whole else (True,):
                known = candidate.bound if whole else candidate.alike
                if known < self.target and self.left > 0:
                    ready = Prepared.of(self.cost, candidate.choice, per_device)
                    candidate.bound = max(candidate.bound, self._solve(candidate, ready, "mean", alike=False))
                    candidate.alike = max(candidate.alike, candidate.bound)

    def _solve(self, candidate: Candidate, ready: Prepared, mode: ilp.Mode, *, alike: bool) -> float:
        """One MILP for what beats the best by the tolerance; the lower bound that it proves."""
        horizon = self._horizon(ready)
        found = mixture(ready.rates, horizon, mixed=True)  # limits get tighter as the target falls
        if found is not None and found.bound >= horizon:
            return self._capped(found.bound, horizon)
        limits = found.limits if found else Limits.of(ready.rates, horizon)
        if alike:
            limits = limits.alike(ready.rates)
        model = ilp.build(ready.rates, ready.graph, horizon, mode, limits)
        options = SolverOptions(self.options.name, max(0.1, self.left), self.options.relative_gap / 4)
        run = ilp.solve(model, options)
        self.solved += 1
        bound = self._capped(run.bound, horizon)  # before the target moves
        if run.status in ("optimal", "feasible"):
            self.offer(ready.layout(ilp.extract(model)))
        return bound

    def found(self, scope: ExactOver) -> Found:
        """What the search has shown so far."""
        exact: ExactOver
        devices = min([c.bound for c in self.open] + [self.seconds])
        classes = min([c.alike for c in self.open] + [self.seconds])
        if devices >= self.target and scope == "devices":
            exact, bound = "devices", devices
        elif classes >= self.target and scope != "not solved":
            exact, bound = "classes", classes
        else:
            exact, bound = "not solved", devices if scope == "devices" else classes
        status = "feasible" if exact == "not solved" else "optimal"
        return Found(self.best, self.seconds, bound, exact, status, len(self.open), self.solved)


def search(
    cost: CostModel,
    options: SolverOptions,
    micro_batch_limit: int,
    incumbents: Sequence[Layout | None],
    progress: Callable[[str], None] = lambda text: None,
) -> Found:
    """The fastest layout; never slower than any incumbent that fits."""
    end = time.monotonic() + options.time_limit
    state = Search(cost, options, end)
    for layout in incumbents:
        state.offer(layout)
    progress("bounding")
    state.open, scope = candidates(cost, micro_batch_limit, state.seconds)
    for doing, step in (("bounding", state.bound), ("placing", state.place)):
        progress(doing)
        state.deadline = (time.monotonic() + end) / 2  # leave time for the next step
        step()
    progress("proving")
    state.deadline = end
    state.prove()
    state.prove_devices(scope == "devices")
    return state.found(scope)
