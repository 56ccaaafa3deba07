"""One layer's experts -> ranks, so that the latest rank is early: longest first, moves and swaps, and a small MILP."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pulp

from hetermoe_cli.planner.arrays import FloatArray, IntArray
from hetermoe_cli.planner.solver import SolverOptions, solve_problem

ROUNDS = 1000
SMALLEST_GAIN = 1e-9  # of the level: less is rounding
MOST_BINARIES = 400


@dataclass(frozen=True)
class LayerWork:
    """Experts to host. `seconds` and `size` (bytes) are [ranks, experts]; the rest is [ranks].

    `offset`: a rank's level before it hosts anything; `room`: bytes; `most`: experts that it may host.
    """

    seconds: FloatArray
    offset: FloatArray
    size: FloatArray
    room: FloatArray
    most: IntArray

    def levels(self, hosts: IntArray) -> FloatArray:
        """[ranks] offset and seconds of the hosted experts; -inf where none is hosted. `hosts`: rank of each expert."""
        level = self.ends(hosts)
        level[np.bincount(hosts, minlength=len(level)) == 0] = -np.inf
        return level

    def ends(self, hosts: IntArray) -> FloatArray:
        """[ranks] offset and seconds of the hosted experts."""
        level = self.offset.copy()
        np.add.at(level, hosts, self.seconds[hosts, np.arange(len(hosts))])
        return level

    def peak(self, hosts: IntArray) -> float:
        """The latest rank's level."""
        return float(self.levels(hosts).max()) if len(hosts) else -np.inf

    def used(self, hosts: IntArray) -> FloatArray:
        """[ranks] bytes of the hosted experts."""
        held = np.zeros(len(self.offset))
        np.add.at(held, hosts, self.size[hosts, np.arange(len(hosts))])
        return held


class Change(NamedTuple):
    """Another assignment, and the higher of the two levels that differ."""

    level: float
    hosts: IntArray


def assign(work: LayerWork, exact: SolverOptions | None = None) -> IntArray | None:
    """The rank of each expert; None where the room does not hold what is left. `exact`: solve small layers by MILP."""
    hosts = longest_first(work)
    if hosts is None or not len(hosts):
        return hosts
    hosts = swapped(work, hosts)
    if exact and np.count_nonzero(work.most) * len(hosts) <= MOST_BINARIES:
        return _solved(work, hosts, exact)
    return hosts


def longest_first(work: LayerWork) -> IntArray | None:
    """Every expert, longest first, where it ends first; None where no rank has room for one."""
    level, room, most = work.offset.copy(), work.room.copy(), work.most.copy()
    hosts = np.zeros(work.seconds.shape[1], dtype=np.int64)
    for expert in np.argsort(-work.seconds.mean(axis=0), kind="stable"):
        fits = (most > 0) & (work.size[:, expert] <= room)
        if not fits.any():
            return None
        rank = int(np.where(fits, level + work.seconds[:, expert], np.inf).argmin())
        level[rank] += work.seconds[rank, expert]
        room[rank] -= work.size[rank, expert]
        most[rank] -= 1
        hosts[expert] = rank
    return hosts


def swapped(work: LayerWork, hosts: IntArray) -> IntArray:
    """Best moves and swaps of the latest rank's experts, until none helps."""
    for _ in range(ROUNDS):
        levels = work.levels(hosts)
        source = int(levels.argmax())
        best = min(changes(work, hosts, source, 1), key=lambda change: change.level, default=None)
        if best is None or not best.level < levels[source] - SMALLEST_GAIN * abs(levels[source]):
            break
        hosts = best.hosts
    return hosts


def changes(work: LayerWork, hosts: IntArray, source: int, count: int) -> Iterator[Change]:
    """The best `count` moves away from rank `source` that fit, then the best swaps with other ranks."""
    mine = np.flatnonzero(hosts == source)
    if not len(mine):
        return
    levels, room = work.ends(hosts), work.room - work.used(hosts)
    moved = _moved(work, hosts, source, mine, levels, room)
    for index in _lowest(moved, count):
        row, target = np.unravel_index(index, moved.shape)
        changed = hosts.copy()
        changed[mine[row]] = target
        yield Change(float(moved[row, target]), changed)
    others = np.flatnonzero(hosts != source)
    traded = _traded(work, hosts, source, mine, others, levels, room)
    for index in _lowest(traded, count):
        row, column = np.unravel_index(index, traded.shape)
        changed = hosts.copy()
        changed[mine[row]], changed[others[column]] = hosts[others[column]], source
        yield Change(float(traded[row, column]), changed)


def _lowest(values: FloatArray, count: int) -> IntArray:
    """Flat indices of the lowest finite values."""
    flat = values.ravel()
    order = np.argsort(flat, kind="stable")[:count]
    return order[np.isfinite(flat[order])]


def _moved(
    work: LayerWork, hosts: IntArray, source: int, mine: IntArray, levels: FloatArray, room: FloatArray
) -> FloatArray:
    """[mine, ranks] higher level after a move; infinite where it does not fit."""
    left = levels[source] - work.seconds[source, mine] if len(mine) > 1 else np.full(1, -np.inf)
    result: FloatArray = np.maximum(left[:, None], (levels[:, None] + work.seconds[:, mine]).T)
    full = np.bincount(hosts, minlength=len(levels)) >= work.most
    result[(work.size[:, mine] > room[:, None]).T | full[None, :]] = np.inf
    result[:, source] = np.inf
    return result


def _traded(
    work: LayerWork,
    hosts: IntArray,
    source: int,
    mine: IntArray,
    others: IntArray,
    levels: FloatArray,
    room: FloatArray,
) -> FloatArray:
    """[mine, others] higher level after a swap; infinite where it does not fit."""
    host = hosts[others]
    given, got = np.ix_(host, mine), (source, others)
    here = levels[source] - work.seconds[source, mine][:, None] + work.seconds[got][None, :]
    there = (levels[host] - work.seconds[host, others])[None, :] + work.seconds[given].T
    result: FloatArray = np.maximum(here, there)
    fits_here = work.size[got][None, :] - work.size[source, mine][:, None] <= room[source]
    fits_there = work.size[given].T - work.size[host, others][None, :] <= room[host][None, :]
    result[~(fits_here & fits_there)] = np.inf
    return result


def _solved(work: LayerWork, known: IntArray, options: SolverOptions) -> IntArray:
    """The MILP's assignment where it is better than `known` within the solver's time.

    Levels count from the lowest offset, in units of the longest expert or offset. Equal ranks are ordered by seconds.
    """
    world, experts = work.seconds.shape
    unit = max(float(work.seconds.max()), float(np.ptp(work.offset)))
    if not unit > 0:
        return known
    seconds, offset = work.seconds / unit, (work.offset - work.offset.min()) / unit
    peak = (work.peak(known) - float(work.offset.min())) / unit
    problem = pulp.LpProblem("assign", pulp.LpMinimize)
    latest = problem.add_variable("latest", 0, peak)
    here = [
        [problem.add_variable(f"x_{rank}_{expert}", cat=pulp.LpBinary) for expert in range(experts)]
        for rank in range(world)
    ]
    problem += latest
    for expert in range(experts):
        problem += pulp.lpSum(here[rank][expert] for rank in range(world)) == 1
    load = [pulp.lpDot(seconds[rank].tolist(), here[rank]) for rank in range(world)]
    for rank in range(world):
        for expert in range(experts):  # a rank that hosts nothing does not count
            problem += latest >= load[rank] + float(offset[rank]) * here[rank][expert]
        problem += pulp.lpSum(here[rank]) <= int(work.most[rank])
        if work.size[rank].sum() > work.room[rank]:
            largest = float(work.size[rank].max())
            held = pulp.lpDot((work.size[rank] / largest).tolist(), here[rank])
            problem += held <= max(0.0, float(work.room[rank]) / largest)
    for first, second in _equal_ranks(work):
        problem += load[first] >= load[second]
    run = solve_problem(problem, options)
    if run.status not in ("optimal", "feasible"):
        return known
    hosts = np.array([[round(v.value() or 0) for v in row] for row in here], dtype=np.int64).argmax(axis=0)
    better = work.peak(hosts) < work.peak(known) and bool((work.used(hosts) <= work.room).all())
    return hosts if better else known


def _equal_ranks(work: LayerWork) -> Iterator[tuple[int, int]]:
    """Neighbours in groups of ranks that may be renumbered."""
    last: dict[tuple[object, ...], int] = {}
    for rank in range(len(work.offset)):
        key = (work.offset[rank], work.room[rank], work.most[rank], work.seconds[rank].tobytes())
        if key in last:
            yield last[key], rank
        last[key] = rank
