"""The solver adapter: silent, honest about time limits and infeasibility, one line where a solver is missing."""

import pulp
import pytest

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.planner.solver import SolverOptions, check_available, solve_problem


def knapsack(size: int, capacity: float) -> pulp.LpProblem:
    """Minimise minus the value packed."""
    problem = pulp.LpProblem("knapsack", pulp.LpMinimize)
    items = [problem.add_variable(f"x_{index}", 0, 1, pulp.LpInteger) for index in range(size)]
    weights = [37 + (index * 7919) % 101 for index in range(size)]
    values = [-(weight + index % 7) for index, weight in enumerate(weights)]
    problem.setObjective(pulp.lpDot(values, items))
    problem += pulp.lpDot(weights, items) <= capacity
    return problem


@pytest.mark.parametrize("name", ["highs", "cbc"])
def test_optimum_and_bound_agree_and_nothing_is_printed(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    run = solve_problem(knapsack(12, 300.0), SolverOptions(name, relative_gap=0.0))
    assert run.status == "optimal"
    assert run.bound == pytest.approx(run.objective)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


@pytest.mark.parametrize("name", ["highs", "cbc"])
def test_infeasible_is_infeasible_although_numbers_are_left(name: str) -> None:
    problem = knapsack(3, -1.0)
    assert solve_problem(problem, SolverOptions(name)).status == "infeasible"


def test_a_run_without_time_claims_nothing() -> None:
    run = solve_problem(knapsack(200, 5000.0), SolverOptions(time_limit=1e-9, relative_gap=0.0))
    assert run.status in ("unknown", "feasible")
    assert run.bound <= solve_problem(knapsack(200, 5000.0), SolverOptions(relative_gap=0.0)).objective + 1e-6


@pytest.mark.parametrize("name", ["no such solver", "GUROBI"])
def test_missing_solver(name: str) -> None:
    with pytest.raises(UserError, match=r"usable: .*HiGHS") as caught:
        check_available(name)
    assert caught.value.code is ExitCode.SOLVER
