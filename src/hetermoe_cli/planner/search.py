"""Outer search over schedule, R, recompute and sequences: bound all, place well where promising, solve few exactly.

1. Closed-form bounds of every choice (bounds.py); those that cannot beat the best layout so far are dropped.
2. In order of their bounds: a bound from patterns (master.py), and where that leaves hope a heuristic placement.
3. In order of the better bounds: the MILP, first with classes' means (a bound for every device-level placement), then
   as it stands, and with few devices one class per device. Each may only find what beats the best by the tolerance.
Every step keeps the lower bound of every choice, so that the smallest one bounds the searched space.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.planner import heuristic, ilp
from hetermoe_cli.planner.candidates import Candidate, candidates
from hetermoe_cli.planner.master import Mixture, mixture
from hetermoe_cli.planner.prepared import Prepared
from hetermoe_cli.planner.replay import overflow
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.planner.space import DEVICE_LEVEL_LIMIT
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.plan import Layout


@dataclass
class Found:
    """Result of a search; `bound` holds for every layout of the searched space."""

    layout: Layout | None
    seconds: float
    bound: float
    exact_over: str
    status: str
    candidates: int
    solved: int


@dataclass
class Search:
    """State of one search; `best` is the fastest layout replayed so far."""

    cost: CostModel
    options: SolverOptions
    deadline: float
    progress: Callable[[str], None]
    best: Layout | None = None
    seconds: float = inf
    solved: int = 0
    open: list[Candidate] = field(default_factory=list)
    mixtures: dict[int, Mixture] = field(default_factory=dict)

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

    def place(self) -> None:
        """Step 2."""
        for candidate in self.open:
            if candidate.bound >= self.target or self.left < 0:
                continue
            ready = Prepared.of(self.cost, candidate.choice)
            found = mixture(ready.rates, self.target)
            if found is not None:
                candidate.bound, candidate.limits = max(candidate.bound, min(found.bound, self.target)), found.limits
                if candidate.bound >= self.target:
                    continue
            self._heuristic(ready, found)

    def _heuristic(self, ready: Prepared, found: Mixture | None) -> None:
        starts = heuristic.starts(ready.rates, found)
        _, counts = heuristic.improve(ready.rates, ready.graph, starts)
        if counts is not None:
            self.offer(ready.layout(counts))

    def prove(self) -> None:
        """Step 3."""
        for candidate in sorted(self.open, key=lambda c: c.bound):
            if candidate.bound >= self.target or self.left < 0:
                continue
            ready = Prepared.of(self.cost, candidate.choice)
            self._solve(candidate, ready, "mean")
            if candidate.bound >= self.target or ready.single:
                continue
            if len(self.cost.devices) <= DEVICE_LEVEL_LIMIT:
                candidate.limits = None
                self._solve(candidate, Prepared.of(self.cost, candidate.choice, per_device=True), "mean")
            else:
                self._solve(candidate, ready, "largest")

    def _solve(self, candidate: Candidate, ready: Prepared, mode: ilp.Mode) -> None:
        """One MILP for what beats the best by the tolerance; its bound counts unless it is pessimistic."""
        horizon = self.target
        if candidate.limits is None:
            found = mixture(ready.rates, horizon)
            if found is not None:
                candidate.bound, candidate.limits = max(candidate.bound, min(found.bound, horizon)), found.limits
                if candidate.bound >= horizon:
                    return
        model = ilp.build(ready.rates, ready.graph, horizon, mode, candidate.limits)
        options = SolverOptions(self.options.name, max(0.1, self.left), self.options.relative_gap / 4)
        run = ilp.solve(model, options)
        self.solved += 1
        if run.status in ("optimal", "feasible"):
            self.offer(ready.layout(ilp.extract(model)))
        if mode == "mean":
            candidate.bound = max(candidate.bound, min(run.bound, horizon))


def search(
    cost: CostModel,
    options: SolverOptions,
    micro_batch_limit: int,
    incumbents: Sequence[Layout | None],
    progress: Callable[[str], None] = lambda text: None,
) -> Found:
    """The fastest layout; never slower than any incumbent that fits."""
    state = Search(cost, options, time.monotonic() + options.time_limit, progress)
    for layout in incumbents:
        state.offer(layout)
    progress("bounding")
    state.open, whole = candidates(cost, micro_batch_limit, state.seconds)
    total = len(state.open)
    state.place()
    state.prove()
    bound = min([c.bound for c in state.open] + [state.seconds])
    proven = bound >= state.target
    exact = ("devices" if whole else "classes") if proven else "not solved"
    return Found(state.best, state.seconds, bound, exact, "optimal" if proven else "feasible", total, state.solved)
