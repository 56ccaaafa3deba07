"""`hetermoe plan`, `simulate` and `train` with several groups, objectives and prices."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import make_inputs, make_layout, make_plan
from hetermoe_cli.cli.main import main
from hetermoe_cli.planner.cluster.replayed import replay_groups
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.plan import Group, Plan
from hetermoe_cli.trace import read_trace

NODES = [("new", 1), ("old", 1)] * 2
LAYOUT = make_layout((1, 0), (0, 4), micro_batches=2)


@pytest.fixture
def two_groups(tmp_path: Path) -> Path:
    """A plan of two equal groups on ranks 0, 1 and 2, 3."""
    inputs = make_inputs(NODES, global_batch_sequences=4)
    one = make_plan(inputs, make_layout((1, 0, 1, 0), (0, 2, 0, 2)))
    group = Group.of(LAYOUT, [[0, 1], [2, 3]])
    replayed = replay_groups(inputs, [group])
    predicted = one.predicted.model_copy(
        update={"iteration_seconds": replayed.seconds, "busy_share_per_rank": replayed.busy_share(4)}
    )
    plan = one.model_copy(update={"groups": [group], "predicted": predicted, "max_groups": None})
    dump(plan, tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def hetermoe(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["hetermoe", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code if isinstance(caught.value.code, int) else 0


def test_simulate_shows_every_layout_and_merges_the_traces(
    two_groups: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, trace = load(Plan, two_groups), two_groups.parent / "trace.json"
    assert hetermoe(monkeypatch, "simulate", two_groups, "--json", "--trace", trace) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["iteration_seconds"] == pytest.approx(plan.predicted.iteration_seconds)
    (group,) = found["groups"]
    assert group["replicas"] == [[0, 1], [2, 3]]
    assert group["iteration_seconds"] == pytest.approx(plan.predicted.iteration_seconds)
    merged = read_trace([trace])
    assert {span.rank for span in merged.spans} == {0, 1, 2, 3}
    assert merged.seconds == pytest.approx(plan.predicted.iteration_seconds)


def test_simulate_one_group_on_its_local_ranks(
    two_groups: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hetermoe(monkeypatch, "simulate", two_groups, "--group", "0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in found["ranks"]] == [0, 1]
    assert hetermoe(monkeypatch, "simulate", two_groups) == 0
    assert "simulated (modelled profiles)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["simulate", "PLAN", "--group", "1"], "--group 1: the plan has groups 0 to 0"),
        (["simulate", "PLAN", "--schedule"], "it has several groups: choose a group with --group 0 to 0"),
    ],
)
def test_what_needs_one_group_says_so_in_one_line(
    two_groups: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    code = hetermoe(monkeypatch, *[two_groups if word == "PLAN" else word for word in arguments])
    error = capsys.readouterr().err
    assert code == 3
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_one_group_that_leaves_devices_out_is_not_called_several(
    two_groups: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = load(Plan, two_groups)
    train = plan.inputs.train.model_copy(update={"global_batch_sequences": 2})
    inputs = plan.inputs.model_copy(update={"train": train})
    changes = {"groups": [Group.of(LAYOUT, [[0, 1]])], "inputs": inputs, "inputs_sha256": inputs.hashes()}
    dump(plan.model_copy(update=changes), two_groups)
    assert hetermoe(monkeypatch, "simulate", two_groups, "--schedule") == 3
    assert "it leaves devices of the cluster out: choose a group with --group 0" in capsys.readouterr().err
    assert hetermoe(monkeypatch, "simulate", two_groups, "--schedule", "--group", 0) == 0


def files(folder: Path, edit: Any = None) -> list[object]:
    """Arguments of `plan` for a small cluster with prices."""
    inputs = make_inputs(NODES, global_batch_sequences=4)
    for name in ("model", "cluster", "train"):
        dump(getattr(inputs, name), folder / f"{name}.yaml")
    for name, profile in inputs.profiles.items():
        dump(profile, folder / "profiles" / f"{name}.yaml")
    cluster = yaml.safe_load((folder / "cluster.yaml").read_text())
    for node in cluster["nodes"]:
        node["price_per_hour"] = 4.0 if node["device"] == "new" else 0.5
    if edit:
        edit(cluster["nodes"])
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    words = [(f"--{name}", folder / f"{name}.yaml") for name in ("model", "cluster", "train")]
    options = [*words, ("--profiles", folder / "profiles"), ("--output", folder / "plan.yaml"), ("--time-limit", 1)]
    return ["plan", *(word for option in options for word in option)]


def test_plan_for_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert hetermoe(monkeypatch, *files(tmp_path), "--objective", "cost") == 0
    out = capsys.readouterr().out
    plan = load(Plan, tmp_path / "plan.yaml")
    assert plan.economy is not None
    assert (plan.objective, plan.group_count) == ("cost", 1)
    assert f"devices in use cost {plan.economy.dollars_per_hour:,.2f} dollars an hour" in out


@pytest.mark.parametrize(
    ("edit", "option", "words", "code"),
    [
        (
            lambda nodes: nodes[1].pop("price_per_hour"),
            ["--objective", "cost"],
            "nodes.node1.price_per_hour: missing",
            3,
        ),
        (lambda nodes: nodes[0].update(price_per_hour=0), [], "field nodes.0.price_per_hour: Input should be", 3),
        (lambda nodes: nodes[0].update(count=0), [], "field nodes.0.count: Input should be greater than 0", 3),
        (lambda nodes: None, ["--max-cost", "0.1"], "the cheapest devices whose memory holds the model cost 0.5", 4),
    ],
)
def test_bad_prices_and_limits_are_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    edit: Any,
    option: list[str],
    words: str,
    code: int,
) -> None:
    assert hetermoe(monkeypatch, *files(tmp_path, edit), *option) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "plan.yaml").exists()
