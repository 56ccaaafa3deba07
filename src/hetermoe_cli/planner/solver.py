"""The one place that talks to PuLP's solvers: silent, bounded, and honest about what a run proved.

PuLP 3.3.2 and 4 build models alike (`add_variable`) but report differently; only this file knows how.
"""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import highspy
import pulp

from hetermoe_cli.errors import ExitCode, UserError

THREADS = 2
# of constraints that are of the order of one (milp/problem.py): a makespan must not undercut its replay by what adds up
HIGHS_TOLERANCES = {"primal_feasibility_tolerance": 1e-9, "mip_feasibility_tolerance": 1e-9}
# runs that only prove: their horizon leaves few solutions, and strong branching took more than it saved (docs/log.md)
BOUND_ONLY = {"mip_heuristic_effort": 0.0, "mip_pscost_minreliable": 1}
Status = Literal["optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True)
class Run:
    """What a solver run proved; `objective` is meaningful for optimal and feasible, `bound` always."""

    status: Status
    objective: float
    bound: float
    seconds: float


@dataclass(frozen=True)
class SolverOptions:
    """Which solver, when it may stop, and whether it looks for solutions (or cares for the bound alone)."""

    name: str = "highs"
    time_limit: float = 60.0
    relative_gap: float = 1e-3
    heuristics: bool = True


def solve_problem(problem: pulp.LpProblem, options: SolverOptions) -> Run:
    """Minimise. UserError (SOLVER) if the solver cannot run."""
    began = time.monotonic()
    run = _attempt(problem, options)
    if run.status == "unknown" and options.name.lower() == "highs" and run.seconds < options.time_limit / 2:
        # presolve can end just outside HiGHS' tolerances, where the optimum lies on the horizon: try without
        run = _attempt(problem, options, presolve="off")
    return replace(run, seconds=time.monotonic() - began)


def _attempt(problem: pulp.LpProblem, options: SolverOptions, **more: str | float) -> Run:
    solver = _make(options, **more)
    began = time.monotonic()
    try:
        with silent_stdout():
            result = problem.solve(solver)
    except pulp.PulpError as error:
        raise UserError(f"solver {options.name}: it failed ({error})", ExitCode.SOLVER) from error
    seconds = time.monotonic() - began
    status = _status(problem, result)
    objective = float(pulp.value(problem.objective)) if status in ("optimal", "feasible") else float("inf")
    return Run(status, objective, _bound(problem, result, status, objective, options), seconds)


def quiet_highs() -> Any:
    """HiGHS itself, for LPs that go on from their last basis or that PuLP takes longer to build than to solve."""
    with silent_stdout():
        highs = highspy.Highs()  # type: ignore[no-untyped-call]
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", THREADS)  # one pool per process, of one size
    return highs


def check_available(name: str) -> None:
    """UserError (SOLVER) unless PuLP can run the solver `name`."""
    _make(SolverOptions(name))


def _make(options: SolverOptions, **more: str | float) -> Any:
    settings = {"msg": False, "timeLimit": options.time_limit, "gapRel": options.relative_gap}
    if options.name.lower() == "highs":
        if not options.heuristics:
            more |= BOUND_ONLY
        solver = pulp.HiGHS(threads=THREADS, **settings, **HIGHS_TOLERANCES, **more)
    else:
        solver = _other(options.name, settings)
    with silent_stdout():
        available = solver.available()
    if not available:
        raise _unavailable(options.name)
    return solver


def _other(name: str, settings: dict[str, Any]) -> Any:
    known = {s.lower(): s for s in pulp.listSolvers()} | {"cbc": "PULP_CBC_CMD" if _bundles_cbc() else "COIN_CMD"}
    if name.lower() not in known:
        raise _unavailable(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PuLP 4 bundles CBC no more
            return pulp.getSolver(known[name.lower()], **settings)
    except (pulp.PulpError, TypeError) as error:
        raise UserError(f"solver {name}: PuLP cannot set it up ({error})", ExitCode.SOLVER) from error


def _bundles_cbc() -> bool:
    return "PULP_CBC_CMD" in pulp.listSolvers()


def _unavailable(name: str) -> UserError:
    with silent_stdout():
        usable = pulp.listSolvers(onlyAvailable=True)
    return UserError(f"solver {name}: not available here; usable: {', '.join(usable) or 'none'}", ExitCode.SOLVER)


def _status(problem: Any, result: Any) -> Status:
    """PuLP 3 calls a run that hit its time limit Optimal: only `sol_status` tells; infeasible runs leave numbers."""
    code = getattr(result, "sol_status", None)
    code = problem.sol_status if code is None else code
    known: dict[int, Status] = {
        pulp.LpSolutionOptimal: "optimal",
        pulp.LpSolutionIntegerFeasible: "feasible",
        pulp.LpSolutionInfeasible: "infeasible",
    }
    if code == pulp.LpSolutionNoSolutionFound and problem.status == pulp.LpStatusInfeasible:
        return "infeasible"  # CBC's presolve; it says "or unbounded", which a makespan is not
    return known.get(code, "unknown")


def _bound(problem: Any, result: Any, status: Status, objective: float, options: SolverOptions) -> float:
    """Proven lower bound on the minimum: the solver's own where it tells, else what its gap promises."""
    if status == "infeasible":
        return float("inf")
    told = getattr(result, "best_bound", None)
    if told is None and options.name.lower() == "highs":
        told = problem.solverModel.getInfo().mip_dual_bound
    if told is not None:
        return min(float(told), objective)
    return objective * (1 - options.relative_gap) if status == "optimal" else float("-inf")


@contextlib.contextmanager
def silent_stdout() -> Iterator[None]:
    """Send file descriptor 1 to nowhere: HiGHS prints a banner from C even when told to be quiet."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # no descriptor 1: nothing can be printed
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, saved)
        stack.callback(os.dup2, saved, 1)
        null = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, null)
        os.dup2(null, 1)
        yield
