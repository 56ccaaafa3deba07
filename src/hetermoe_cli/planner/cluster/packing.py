"""Packing: how many groups of each composition, and what share of the batch each of them takes.

For a given time every composition has a largest share that it ends in time; an integer program chooses how many groups
of each fit into the cluster and take the whole batch. The least such time is found by bisection over the times of all
shares; for the cost objective times over the whole range are looked at.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from math import inf

import pulp

from hetermoe_cli.planner.cluster.compositions import Composition
from hetermoe_cli.planner.cluster.curves import time_at
from hetermoe_cli.planner.solver import SolverOptions, solve_problem

SECONDS = 2.0  # for one integer program; they take milliseconds
LOOKS = 24  # times that the cost objective looks at


@dataclass(frozen=True)
class Limits:
    """What a packing must respect. `prices`: dollars an hour of a device of each node group; `most_cost`: of all."""

    devices: Sequence[int]
    batch: int
    quantum: int
    prices: Sequence[float] | None
    most_cost: float | None
    most_groups: int | None
    solver: str

    def price(self, composition: Composition) -> float:
        """Dollars an hour."""
        return sum(count * price for count, price in zip(composition, self.prices or [], strict=True))


Curve = list[tuple[int, float]]
Packing = dict[Composition, list[int]]  # the share of each group


class Packer:
    """Packings of compositions with known curves."""

    def __init__(
        self, limits: Limits, curves: dict[Composition, Curve], refused: Container[tuple[Composition, int]] = ()
    ) -> None:
        """`refused`: shares, between points or not, at which a composition is known to fit in no way."""
        self.limits, self.refused = limits, refused
        self.curves = {c: curve for c, curve in curves.items() if curve}
        self.times: dict[Composition, list[tuple[int, float]]] = {
            c: [
                (share, time_at(curve, share))
                for share in range(0, limits.batch + 1, limits.quantum)
                if time_at(curve, share) < inf and (c, share) not in refused
            ]
            for c, curve in self.curves.items()
        }
        self.looks = sorted({seconds for times in self.times.values() for _, seconds in times})

    def fastest(self) -> Packing | None:
        """The packing that ends first."""
        low, high = -1, len(self.looks) - 1
        best = self._at(self.looks[high]) if self.looks else None
        if best is None:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            found = self._at(self.looks[middle])
            if found is None:
                low = middle
            else:
                high, best = middle, found
        return self._trimmed(best)

    def cheapest(self) -> Packing | None:
        """The packing that pays least for the batch."""
        best, least = None, inf
        step = max(1, len(self.looks) // LOOKS)
        for seconds in [*self.looks[::step], *self.looks[-1:]]:
            found = self._at(seconds, cheapest=True)
            if found is not None:
                packing = self._trimmed(found)
                if packing is None:
                    continue
                cost = self.price(packing) * self.seconds(packing)
                if cost < least:
                    best, least = packing, cost
        return best

    def seconds(self, packing: Packing) -> float:
        """When the slowest group ends."""
        return max(time_at(self.curves[c], share) for c, shares in packing.items() for share in shares)

    def price(self, packing: Packing) -> float:
        """Dollars an hour of all devices in groups."""
        return sum(self.limits.price(c) * len(shares) for c, shares in packing.items())

    def _at(self, seconds: float, cheapest: bool = False) -> Packing | None:
        """Groups that take the whole batch within `seconds`, with the largest shares they can have."""
        limits = self.limits
        most = {
            c: max((share for share, time in times if time <= seconds), default=0) for c, times in self.times.items()
        }
        most = {c: share for c, share in most.items() if share}
        if not most:
            return None
        problem = pulp.LpProblem("packing", pulp.LpMinimize)
        bound = limits.most_groups
        count = [problem.add_variable(f"n{index}", 0, bound, cat="Integer") for index in range(len(most))]
        taken = pulp.lpSum(n * share for n, share in zip(count, most.values(), strict=True))
        for kind, devices in enumerate(limits.devices):
            problem.addConstraint(pulp.lpSum(n * c[kind] for n, c in zip(count, most, strict=True)) <= devices)
        if bound is not None:
            problem.addConstraint(pulp.lpSum(count) <= bound)
        if limits.most_cost is not None:
            problem.addConstraint(self._cost(count, most) <= limits.most_cost)
        if cheapest:
            problem.addConstraint(taken >= limits.batch)
            problem.setObjective(self._cost(count, most))
        else:
            problem.setObjective(-taken)
        run = solve_problem(problem, SolverOptions(limits.solver, SECONDS))
        if run.status not in ("optimal", "feasible"):
            return None
        numbers = [round(n.value() or 0) for n in count]
        found = {c: [share] * n for (c, share), n in zip(most.items(), numbers, strict=True) if n}
        return found if sum(map(sum, found.values())) >= limits.batch else None

    def _cost(self, count: Sequence[pulp.LpVariable], compositions: Iterable[Composition]) -> pulp.LpAffineExpression:
        """Dollars an hour of `count` groups of each composition."""
        return pulp.lpSum(n * self.limits.price(c) for n, c in zip(count, compositions, strict=True))

    def _less(self, composition: Composition, share: int, most: int) -> int:
        """By how little, up to `most`, a group's share can fall; 0 if it cannot."""
        steps = range(self.limits.quantum, min(most, share - 1) + 1, self.limits.quantum)
        return next((by for by in steps if (composition, share - by) not in self.refused), 0)

    def _trimmed(self, packing: Packing) -> Packing | None:
        """Take what is more than the batch from the groups that end last; groups that would get nothing go.

        None where all that would do it is refused.
        """
        result = {c: list(shares) for c, shares in packing.items()}
        over = sum(map(sum, result.values())) - self.limits.batch
        while over > 0:
            spare = [(len(shares), c) for c, shares in result.items() if shares[-1] <= over]
            if spare:  # a whole group too many
                _, c = max(spare)
                over -= result[c].pop()
                result = {c: shares for c, shares in result.items() if shares}
                continue
            less = {c: self._less(c, max(shares), over) for c, shares in result.items()}
            able = [c for c, by in less.items() if by]
            if not able:
                return None
            slowest = max(able, key=lambda c: (time_at(self.curves[c], max(result[c])), max(result[c])))
            place = result[slowest].index(max(result[slowest]))
            result[slowest][place] -= less[slowest]
            over -= less[slowest]
        return {c: sorted(shares) for c, shares in result.items()}
