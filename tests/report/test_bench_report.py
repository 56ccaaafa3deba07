"""A bench pairs rounds, brings emulated seconds to nominal ones, and never hides that an emulation was invalid."""

import json
from pathlib import Path

import pytest

from builders import make_layout
from hetermoe_cli.report.bench import Bench, Sample, kendall_tau, ratio, read_sample, render, summarise
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.trace import read_trace
from run_builders import FIRST_STEP, measured_plan, write_run

SCALE = 10.0


@pytest.mark.parametrize(
    ("one", "other", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [2, 1, 3, 4], 4 / 6),
        ([1, 1, 2], [1, 2, 3], 2 / 6**0.5),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_kendall_tau(one: list[float], other: list[float], tau: float | None) -> None:
    assert kendall_tau(one, other) == (None if tau is None else pytest.approx(tau))


def test_a_machine_that_slows_down_for_all_changes_no_ratio() -> None:
    base = [[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]]
    found = ratio([[2 * seconds for seconds in run] for run in base], base)
    assert vars(found) == dict.fromkeys(("median", "low", "high", "least", "most"), pytest.approx(2.0))


def test_the_interval_holds_the_median_and_follows_the_noise() -> None:
    base = [[1.0, 1.1, 0.9], [1.0, 1.05, 1.2], [0.95, 1.0, 1.1]]
    noisy = ratio([[1.5, 1.4, 1.9], [1.6, 1.2, 1.5], [1.5, 1.55, 1.3]], base)
    quiet = ratio([[1.5, 1.5, 1.5]] * 3, [[1.0, 1.0, 1.01]] * 3)
    for found in (noisy, quiet):
        assert found.low <= found.median <= found.high
        assert found.least <= found.median <= found.most
    assert noisy.high - noisy.low > 5 * (quiet.high - quiet.low)
    assert noisy == ratio([[1.5, 1.4, 1.9], [1.6, 1.2, 1.5], [1.5, 1.55, 1.3]], base)


def run_of(folder: Path, plan: Plan, slower: float = 1.0, *, valid: bool = True) -> Sample:
    """An emulated run whose timed steps last `slower` times as long as the plan predicts; its first step far longer."""
    write_run(folder, plan, emulated_scale=SCALE)
    lines = []
    for step in range(FIRST_STEP + 4):
        seconds = plan.predicted.iteration_seconds * SCALE * slower * (1 if step else 100)
        lines.append(
            {"event": "step", "step": step, "loss": 1.0, "iteration_seconds": seconds, "expert_imbalance": 1.5}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text(json.dumps({"emulation_valid": valid, "overruns": 3}))
    return read_sample(folder, 1)


def two(tmp_path: Path, *, valid: bool = True) -> tuple[Bench, list[Plan]]:
    """Two plans, two rounds; the second plan takes 3 % more than predicted."""
    plans = [measured_plan(make_layout((1, 1), (2, 2), schedule=name)) for name in ("zebra", "sequential")]
    samples = {
        "a": [run_of(tmp_path / f"a{number}", plans[0]) for number in (1, 2)],
        "b": [run_of(tmp_path / f"b{number}", plans[1], 1.03, valid=valid or number == 1) for number in (1, 2)],
    }
    return summarise({"a": Path("a.yaml"), "b": Path("b.yaml")}, samples, 1, ["something to know"]), plans


def test_nominal_seconds_ratios_and_errors(tmp_path: Path) -> None:
    found, plans = two(tmp_path)
    first, second = found.entries
    expected = [plan.predicted.iteration_seconds for plan in plans]
    assert [first.measured_seconds, second.measured_seconds] == pytest.approx([expected[0], 1.03 * expected[1]])
    assert second.predicted_error == pytest.approx(0.03)
    assert second.predicted_ratio == pytest.approx(expected[1] / expected[0])
    assert second.ratio.median == pytest.approx(1.03 * expected[1] / expected[0])
    assert first.ratio.median == first.predicted_ratio == 1.0
    assert (found.rounds, found.warm_up, found.emulated, found.predicted_tau) == (2, 1, True, None)
    # the builder's router is skewed, and its traces are simulated with the rows that it sent
    steps = read_trace(sorted((tmp_path / "b1/traces").glob("*.json"))).step_seconds()
    replayed = second.replayed_seconds
    assert replayed is not None
    assert min(steps.values()) <= replayed * SCALE * 1.000001
    assert replayed * SCALE <= max(steps.values()) * 1.000001


def test_an_invalid_run_is_counted_and_told(tmp_path: Path) -> None:
    from rich.console import Console

    found, _ = two(tmp_path, valid=False)
    assert [(entry.emulation_valid, entry.invalid_runs) for entry in found.entries] == [(True, 0), (False, 1)]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(found))
    text = capture.get()
    assert "EMULATED" in text
    assert "INVALID in 1 of 2" in text
    assert "note: something to know" in text


def test_the_order_of_three_plans(tmp_path: Path) -> None:
    plan = measured_plan(make_layout((1, 1), (2, 2)))
    slow = plan.predicted.iteration_seconds
    plans = [
        plan.model_copy(update={"predicted": plan.predicted.model_copy(update={"iteration_seconds": factor * slow})})
        for factor in (1.0, 2.0, 3.0)
    ]
    samples = {
        name: [run_of(tmp_path / name, plan, slower)]
        for name, plan, slower in zip("abc", plans, (1.0, 1.0, 0.5), strict=True)
    }
    found = summarise({name: Path(name) for name in "abc"}, samples, 1, [])
    assert found.predicted_tau == pytest.approx(1 / 3)  # 1, 2, 1.5 of predicted 1, 2, 3
    json.dumps(found.as_dict())
