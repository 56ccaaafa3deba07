"""`hetermoe plan --explain` and `--what-if`: tables, the JSON object, and refusals."""

import json
import subprocess
from pathlib import Path

import pytest

from builders import make_inputs, make_profile
from hetermoe_cli.spec.cluster import ClusterSpec
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.plan import Plan
from train_command import run as hetermoe


@pytest.fixture
def arguments(tmp_path: Path) -> list[object]:
    """Of a plan for one new and one old device; a third type, newest, has a profile."""
    inputs = make_inputs(global_batch_sequences=4)
    for name in ("model", "cluster", "train"):
        dump(getattr(inputs, name), tmp_path / f"{name}.yaml")
    for profile in (*inputs.profiles.values(), make_profile("newest", attention_seconds=0.5)):
        dump(profile, tmp_path / "profiles" / f"{profile.device}.yaml")
    names = ("model", "cluster", "train")
    words: list[object] = ["plan", *(word for name in names for word in (f"--{name}", tmp_path / f"{name}.yaml"))]
    return [*words, "--profiles", tmp_path / "profiles", "--output", tmp_path / "plan.yaml", "--time-limit", 2]


def run(arguments: list[object], *more: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = hetermoe(*arguments, *more)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_variants_are_compared_with_the_plan(arguments: list[object], tmp_path: Path) -> None:
    changes = ["+1 old", "-1 old", "+1 newest,-1 new"]
    options = [word for change in changes for word in ("--what-if", change)]
    done = run(arguments, *options, "--json")
    found = json.loads(done.stdout)
    assert [variant["change"] for variant in found["what_if"]] == ["+1 old", "-1 old", "+1 newest, -1 new"]
    assert [variant["devices"] for variant in found["what_if"]] == [
        {"new": 1, "old": 2},
        {"new": 1},
        {"old": 1, "newest": 1},
    ]
    base = found["predicted"]["tokens_per_second"]
    for variant in found["what_if"]:
        assert variant["tokens_per_second"] == pytest.approx(4 * 64 / variant["iteration_seconds"])
        assert variant["gained"] == pytest.approx(variant["tokens_per_second"] / base - 1)
        count = sum(variant["devices"].values())
        assert variant["tokens_per_second_per_device"] == pytest.approx(variant["tokens_per_second"] / count)
        assert variant["gap"] >= 0
        assert variant["price_per_hour"] is None
    more, less, newer = found["what_if"]
    assert more["gained"] > 0
    assert less["gained"] < 0
    assert newer["gained"] > 0
    assert load(Plan, tmp_path / "plan.yaml").model_dump(mode="json") == found
    lines = done.stderr.splitlines()
    assert lines[:3] == [
        "hetermoe: what-if 1 of 3: +1 old",
        "hetermoe: what-if 2 of 3: -1 old",
        "hetermoe: what-if 3 of 3: +1 newest, -1 new",
    ]


def test_a_variant_is_what_a_plan_of_that_cluster_is(arguments: list[object], tmp_path: Path) -> None:
    variant = json.loads(run(arguments, "--what-if", "-1 old", "--json").stdout)["what_if"][0]
    cluster = load(ClusterSpec, tmp_path / "cluster.yaml")
    dump(cluster.model_copy(update={"nodes": cluster.nodes[:1]}), tmp_path / "cluster.yaml")
    alone = json.loads(run(arguments, "--json").stdout)
    assert alone["what_if"] == []
    assert variant["iteration_seconds"] == pytest.approx(alone["predicted"]["iteration_seconds"], rel=2e-3)


def test_prices_give_tokens_per_dollar(arguments: list[object], tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    cluster = load(ClusterSpec, path)
    nodes = [
        node.model_copy(update={"price_per_hour": price}) for node, price in zip(cluster.nodes, (3.0, 1.0), strict=True)
    ]
    dump(cluster.model_copy(update={"nodes": nodes}), path)
    options = ["--what-if", "+2 old", "--what-if", "+1 newest"]
    more, newest = json.loads(run(arguments, *options, "--json").stdout)["what_if"]
    assert more["price_per_hour"] == 3.0 + 3 * 1.0
    assert more["tokens_per_dollar"] == pytest.approx(3600 * more["tokens_per_second"] / 6.0)
    assert newest["price_per_hour"] is None  # nobody said what it costs
    table = run(arguments, *options).stdout
    assert "price/h" in table
    assert "tokens/$" in table


def test_explain_adds_one_device_of_each_type_and_runner_ups(arguments: list[object]) -> None:
    found = json.loads(run(arguments, "--explain", "--what-if", "+1 old", "--json").stdout)
    assert [variant["change"] for variant in found["what_if"]] == ["+1 new", "+1 old"]
    assert found["explanation"]["runner_ups"]
    out = run(arguments, "--explain").stdout
    for words in (
        "Runner-ups",
        "why it lost",
        "What if",
        "as it is",
        "+1 new",
        "+1 old",
        "binding: ",
        "critical path: ",
    ):
        assert words in out, words


def test_a_plan_names_what_binds_it(arguments: list[object]) -> None:
    out = run(arguments).stdout
    line = next(line for line in out.splitlines() if line.startswith("binding: "))
    assert " of " in line
    assert "Runner-ups" not in out
    assert "What if" not in out


def test_a_variant_that_does_not_fit_says_why(arguments: list[object], tmp_path: Path) -> None:
    for path in (tmp_path / "profiles").glob("*.yaml"):
        path.write_text(path.read_text().replace("memory_bytes: 10000000000", "memory_bytes: 6500000"))
    found = json.loads(run(arguments, "--what-if", "-1 old", "--json").stdout)
    (variant,) = found["what_if"]
    assert variant["iteration_seconds"] is None
    assert variant["gained"] is None
    assert "does not fit" in variant["reason"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("2 old", "'2 old' is no change: write '+2 A40' or '-1 V100'"),
        ("-2 old", "2 old to remove, there are 1"),
        ("-1 old,-1 new", "no device would be left"),
        ("+1 abacus", "no profile abacus.yaml in"),
    ],
)
def test_refusals_before_anything_is_planned(arguments: list[object], tmp_path: Path, change: str, words: str) -> None:
    done = run(arguments, "--what-if", change, code=3)
    assert done.stdout == ""
    assert done.stderr.startswith("hetermoe: error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not (tmp_path / "plan.yaml").exists()
