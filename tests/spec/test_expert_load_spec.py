"""spec/load.py: shares, imbalance, what a file refuses, and which models it fits; the plan's hash of it."""

from pathlib import Path

import pytest

from builders import make_inputs, make_layout, make_model, make_plan
from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.load import ExpertLoad
from hetermoe_cli.spec.plan import Plan


def test_counts_and_shares_mean_the_same() -> None:
    counts, shares = ExpertLoad(layers=[[30, 10], [5, 5]]), ExpertLoad(layers=[[0.75, 0.25], [0.5, 0.5]])
    assert counts.shares == shares.shares == [[0.75, 0.25], [0.5, 0.5]]
    assert counts.imbalance == [1.5, 1.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers: [[1, 2], [3]]", "layers.1: 1 experts, layers.0 has 2"),
        ("layers: [[1, 2], [0, 0]]", "layers.1: no expert gets a row"),
        ("layers: [[1, -2]]", "layers.0.1: Input should be greater than or equal to 0"),
        ("layers: [[1, .inf]]", "layers.0.1"),
        ("layers: [[1, 2]]\nsamples: [[[1, 2], [2, 1]]]", "samples.0: 2 layers, layers has 1"),
        ("layers: [[1, 2]]\nsamples: [[[1, 2]], [[1, 2, 3]]]", "samples.1.0: 3 experts, layers.0 has 2"),
        ("layers: [[1, 2]]\nsamples: [[[0, 0]]]", "samples.0.0: no expert gets a row"),
        ("layers: []", "layers: List should have at least 1 item"),
        ("layers: [[1, 2]]\ncolour: red", "field colour: unknown field"),
        ("kind: plan\nlayers: [[1, 2]]", "field kind"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "load.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load(ExpertLoad, path)
    assert expected in str(error.value)
    assert str(error.value).startswith(f"{path}: ")


def test_only_loads_of_the_model() -> None:
    model = make_model(layers=2, experts=4, top_k=2)
    ExpertLoad(layers=[[1, 1, 0, 0]] * 2).check(model, "file")
    with pytest.raises(UserError, match="file: field layers: 1 layers of 4 experts, model synthetic has 2 of 4"):
        ExpertLoad(layers=[[1, 1, 0, 0]]).check(model, "file")
    with pytest.raises(UserError, match="2 layers of 3 experts"):
        ExpertLoad(layers=[[1, 1, 1]] * 2).check(model, "file")
    with pytest.raises(
        UserError, match=r"file: field layers.1.2: 60% of the layer's rows, but with top-2 .* at most 50%"
    ):
        ExpertLoad(layers=[[1, 1, 1, 1], [1, 2, 6, 1]]).check(model, "file")
    even = [[1.0, 1, 1, 1]] * 2
    with pytest.raises(UserError, match=r"file: field samples.1.0.3: 70% of the layer's rows"):
        ExpertLoad(layers=even, samples=[even, [[1, 1, 1, 7], [1, 1, 1, 1]]]).check(model, "file")


def test_steps_are_the_samples_or_the_load_itself() -> None:
    alone = ExpertLoad(layers=[[3, 1]])
    assert alone.steps == [alone]
    sampled = ExpertLoad(source="here", layers=[[3, 1]], samples=[[[2, 0]], [[1, 1]]])
    assert [step.layers for step in sampled.steps] == sampled.samples
    assert {step.source for step in sampled.steps} == {"here"}


def test_a_plan_hashes_its_load_and_checks_its_shape(tmp_path: Path) -> None:
    inputs = make_inputs()
    loaded = inputs.model_copy(update={"expert_load": ExpertLoad(layers=[[2, 1, 1, 1]] * 2)})
    assert set(loaded.hashes()) - set(inputs.hashes()) == {"expert_load"}
    path = tmp_path / "plan.yaml"
    dump(make_plan(loaded, make_layout()), path)
    load(Plan, path).verify(str(path))
    text = path.read_text()
    edited = text.replace("2.0, 1.0, 1.0, 1.0", "3.0, 1.0, 1.0, 1.0", 1)
    assert edited != text
    path.write_text(edited)
    with pytest.raises(UserError, match=r"inputs\.expert_load: its hash does not match"):
        load(Plan, path).verify(str(path))
    path.write_text(
        text.replace("2.0, 1.0, 1.0, 1.0", "2.0, 1.0, 1.0").replace("[1.0, 1.0, 1.0]", "[1.0, 1.0, 1.0, 1.0]")
    )
    with pytest.raises(UserError, match="2 layers of 3 experts"):
        load(Plan, path)


def test_figures_whose_sum_is_no_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0: the figures are too large to add up: write shares"):
        ExpertLoad(layers=[[1e308, 1e308]])
