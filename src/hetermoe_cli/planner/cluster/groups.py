"""The planner of groups: explore compositions, pack them, look again at what was chosen, replay, keep the best.

1. Every composition that can hold the model gets a point at its fair share of the batch, most promising first, by a
   quick estimate, until half of the time is gone; the most efficient ones get more points.
2. An integer program packs them (packing.py); the points that it interpolated are computed, and it packs again.
3. What it settles on is replayed group by group in the simulator, with memory checked rank by rank.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, lcm

from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.cluster.compositions import Composition, compositions, ranks_of
from hetermoe_cli.planner.cluster.curves import Curves
from hetermoe_cli.planner.cluster.evaluate import FULL
from hetermoe_cli.planner.cluster.objective import Wanted, known_prices, merit, prices
from hetermoe_cli.planner.cluster.packing import Limits, Packer, Packing
from hetermoe_cli.planner.cluster.replayed import Replayed, joined, replay_group
from hetermoe_cli.planner.cluster.trim import trimmed
from hetermoe_cli.planner.cluster.worth import Worth, finest
from hetermoe_cli.planner.reasons.remedies import lacking_states
from hetermoe_cli.planner.solver import SolverOptions
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.plan import Group, ranks_in

ROUNDS = 10  # of packing and computing or replaying what was chosen
LAST_ROUND = 100  # if not one packing could be replayed before
FAR = 1.1  # times what is to be beaten: more points and other layouts do not gain as much
CLOSE = 0.01  # relative error of estimates that makes another round pointless
ESTIMATING = 0.15  # of the time limit
MORE = 12  # compositions that get more points
PATIENCE = 4.0  # times the time limit, if nothing could be packed within it
SCALES = (0.5, 0.75, 1.25, 1.5, 2.0)  # of the fair share


@dataclass(frozen=True)
class FoundGroups:
    """The best groups, their replay, and how much was looked at."""

    groups: list[Group]
    replayed: Replayed
    compositions: int
    evaluated: int
    merit: float = inf  # by the objective, the less the better


class GroupSearch:
    """State of one search over groups. `beat`: seconds of the whole cluster as one group, if that is planned already:
    it is not looked at then."""

    def __init__(
        self, cost: CostModel, solver: SolverOptions, limit: int, wanted: Wanted, *, beat: float = inf
    ) -> None:
        self.cost, self.inputs, self.solver, self.wanted = cost, cost.inputs, solver, wanted
        self.beat, self.largest = beat, len(cost.devices) - (beat < inf)
        self.cluster = cost.inputs.cluster
        self.batch = cost.train.global_batch_sequences
        self.curves = Curves(self.inputs, limit, wanted.most_groups)
        self.began = time.monotonic()
        self.fair: dict[Composition, int] = {}
        self.limits = Limits(
            devices=[node.count * node.devices for node in self.cluster.nodes],
            batch=self.batch,
            quantum=finest(self.batch),
            prices=prices(self.cluster) if wanted.needs_prices else known_prices(self.cluster),
            most_cost=wanted.most_cost,
            most_groups=wanted.most_groups,
            solver=solver.name,
        )
        self.worth = Worth(cost, wanted, self.limits)
        self.best: FoundGroups | None = None

    def past(self, share: float) -> bool:
        """Whether this share of the time limit is gone."""
        return time.monotonic() - self.began > share * self.solver.time_limit

    def explore(self, patient: bool = False) -> None:
        """Points of all compositions at their fair shares, then more of the most efficient ones.

        Until half of the time is gone and some can be packed; if `patient` until PATIENCE times the limit are gone.
        """
        found = self.candidates()
        if not found:
            return
        speed = self.worth.speeds
        whole = sum(speed[kind] * count for kind, count in enumerate(self.limits.devices))
        shares = {c: self.batch * sum(s * count for s, count in zip(speed, c, strict=True)) / whole for c in found}
        for c in found:
            self.fair[c] = self._whole(c, shares[c])
        for c in self._in_turn(sorted(found, key=self.worth.promise)):
            if self.past(PATIENCE if patient else 0.5) and (patient or self._pack() is not None):
                break
            self.curves.point(c, self.fair[c])
            groups = self._most(c)
            if self.batch % (groups * self.limits.quantum) == 0:  # the whole batch on such groups alone
                self.curves.point(c, self.batch // groups)
        if self.beat == inf or self._packed_seconds() < FAR * self.beat:
            self._widen()

    def _in_turn(self, found: list[Composition]) -> list[Composition]:
        """First those with a quick estimate, as many as a share of the time limit allows: of every set of node groups
        the most efficient, then of each the second, and so on, as groups of different sets go together."""
        known: dict[tuple[bool, ...], list[tuple[float, Composition]]] = defaultdict(list)
        for c in found:
            if self.cost.model.layers <= FULL or self.past(ESTIMATING):  # short models are placed as fast as estimated
                break
            efficiency = self.fair[c] / self.worth.value(c) / self.curves.promise(c, self.fair[c])
            known[tuple(count > 0 for count in c)].append((-efficiency, c))
        ranked = [(place, one) for several in known.values() for place, one in enumerate(sorted(several))]
        first = [c for _, (_, c) in sorted(ranked)]
        return [*first, *found[len(first) :]]

    def _packed_seconds(self) -> float:
        """What the best groups of the points that are known take, by their estimates; infinite if there are none."""
        packing = self._pack()
        if packing is None:
            return inf
        known = (self.curves.points[c].get(share) for c, shares in packing.items() for share in shares)
        return max((point.seconds for point in known if point), default=0.0)

    def _most(self, c: Composition) -> int:
        """How many such groups the cluster has devices for, and the limit on cost dollars."""
        most = self.curves.alike(c)
        return most if self.wanted.most_cost is None else min(most, int(self.wanted.most_cost / self.limits.price(c)))

    def _widen(self) -> None:
        def efficiency(c: Composition) -> float:
            point = self.curves.points[c].get(self.fair[c])
            return self.fair[c] / self.worth.value(c) / point.seconds if point else 0.0

        looked = sorted((c for c in self.curves.points if self.curves.known(c)), key=efficiency, reverse=True)
        for c in looked[:MORE]:
            shares = [scale * self.fair[c] for scale in SCALES]
            if self.wanted.needs_prices:  # fewer devices may take more of the batch
                shares += [self.batch / groups for groups in (1, 2, 3, 4)]
            for share in shares:
                if self.past(0.7):
                    return
                self.curves.point(c, self._whole(c, share))

    def _whole(self, c: Composition, share: float) -> int:
        """Sequences of about that share: by the quantum, and as many for each of its devices where there are so many.

        Shares of few divisors have few numbers of micro-batches.
        """
        quantum = self.limits.quantum
        step = next(step for step in (lcm(sum(c), quantum), quantum) if step <= max(share, quantum))
        return min(self.batch, max(step, round(share / step) * step))

    def candidates(self) -> list[Composition]:
        """Compositions that hold the model and cost no more than allowed."""
        found = (c for c in compositions(self.cluster) if sum(c) <= self.largest)
        return [c for c in found if self.holds(c) and self.worth.affordable(c)]

    def holds(self, c: Composition) -> bool:
        """Whether the devices' memory holds one copy of all states."""
        return self.worth.holds(c, self.curves.sharing(c)[-1])

    def pack(self) -> None:
        """Pack, compute what was interpolated, pack again; replay it, correct what was estimated, and pack again."""
        for turn in range(LAST_ROUND):
            packing = self._pack()
            if packing is None or (self.best and turn >= ROUNDS):
                return
            new = [(c, share) for c, shares in packing.items() for share in set(shares) if self._unknown(c, share)]
            points = [self.curves.point(c, share) for c, shares in packing.items() for share in shares]
            if not all(points) or (new and turn < ROUNDS and not self.past(0.9)):
                continue
            error = self._replay(packing)
            if self.best and (error < CLOSE or self.past(0.9)):
                return

    def _unknown(self, c: Composition, share: int) -> bool:
        return share not in self.curves.points[c]

    def _pack(self) -> Packing | None:
        known = {c: self.curves.known(c) for c in self.curves.points}
        packer = Packer(self.limits, known, self.curves.refused())
        return packer.cheapest() if self.wanted.objective == "cost" else packer.fastest()

    def _replay(self, packing: Packing) -> float:
        """Replay a packing all of whose points are known, and keep it if it is the best; the largest relative error of
        the estimates, infinite where memory does not hold a layout that seemed to fit, or holds a better one."""
        chosen = [(c, share, shares.count(share)) for c, shares in packing.items() for share in sorted(set(shares))]
        replicas = ranks_of(self.cluster, [(c, number) for c, _, number in chosen])
        done, errors = [], [0.0]
        for (c, share, _), ranks in zip(chosen, replicas, strict=True):
            point = self.curves.point(c, share)
            assert point is not None
            group = Group.of(*trimmed(point.found.layout(), ranks, self.cost.devices))
            done.append(replay_group(self.inputs, group))
            errors.append(self.curves.correct(c, share, done[-1].computed))
        replayed, refused = joined(done, self.cost), False
        for (c, share, _), g in zip(chosen, replayed.groups, strict=True):
            if not g.fits:
                self.curves.refuse(c, share, len(replayed.copies))
                refused = True
        if refused:
            return inf
        groups = [g.group for g in done]
        value = merit(self.cluster, self.wanted, ranks_in(groups), replayed.seconds)
        if value < (self.best.merit if self.best else inf):
            self.best = FoundGroups(groups, replayed, len(self.curves.points), self.curves.evaluated, value)
        copies = len(replayed.copies)
        better = [self.curves.reconsider(c, share, copies) for c, share, _ in chosen]
        return inf if any(better) else max(errors)


def may_split(cost: CostModel, limit: int, wanted: Wanted) -> bool:
    """Whether the memory of some part of the cluster holds the model."""
    return bool(GroupSearch(cost, SolverOptions(), limit, wanted, beat=0.0).candidates())


def find_groups(
    cost: CostModel,
    solver: SolverOptions,
    limit: int,
    wanted: Wanted,
    progress: Callable[[str], None] = lambda text: None,
    *,
    beat: float = inf,
) -> FoundGroups:
    """The best groups. UserError if none fits, or none that the limit on cost allows; with something to `beat` no more
    time is taken to find some."""
    state = GroupSearch(cost, solver, limit, wanted, beat=beat)
    progress("exploring groups")
    state.explore()
    progress("packing groups")
    state.pack()
    if state.best is None and beat == inf:
        state.explore(patient=True)
        state.pack()
    if state.best is None:
        raise _none(cost.inputs, wanted, state)
    return state.best


def _none(inputs: Inputs, wanted: Wanted, state: GroupSearch) -> UserError:
    least = min((state.limits.price(c) for c in _holding(state)), default=inf) if wanted.needs_prices else 0.0
    where = f"model {inputs.model.name} on cluster {inputs.cluster.name}"
    if wanted.most_cost is not None and least > wanted.most_cost and least < inf:
        return UserError(
            f"{where}: --max-cost {wanted.most_cost:g}: the cheapest devices whose memory holds the model cost "
            f"{least:g} dollars an hour",
            ExitCode.DOES_NOT_FIT,
        )
    why = lacking_states(state.cost) or (
        "no group of its devices holds the model, its activations and a share of "
        f"{inputs.train.global_batch_sequences} sequences (dense state {inputs.train.dense_state}): add devices, allow "
        "recompute: auto or dense_state: auto, or raise --max-micro-batches"
    )
    return UserError(f"{where}: does not fit: {why}", ExitCode.DOES_NOT_FIT)


def _holding(state: GroupSearch) -> list[Composition]:
    return [c for c in compositions(state.cluster) if state.holds(c)]
