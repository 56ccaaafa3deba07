"""Devices of several precisions: each reads its own tables, rows travel in the training's."""

import pytest

from builders import make_inputs, make_layout, make_model, make_plan, make_profile
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.plan import embed
from hetermoe_cli.planner.reasons.explain import sources
from hetermoe_cli.spec.files import parse
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.profile import Profile
from hetermoe_cli.spec.run import RunSpec
from hetermoe_cli.spec.train import TrainSpec

SPEC = {"sequence_length": 64, "global_batch_sequences": 2, "precision": "bf16"}


def both(name: str, fp16_seconds: float, bf16_seconds: float) -> Profile:
    """A profile with a table of each."""
    one = make_profile(name, precision="fp16", attention_seconds=fp16_seconds)
    other = make_profile(name, precision="bf16", attention_seconds=bf16_seconds)
    return one.model_copy(update={"tables": [*one.tables, *other.tables]})


@pytest.fixture
def inputs() -> Inputs:
    profiles = {"new": both("new", 5.0, 1.0), "old": both("old", 4.0, 40.0)}
    mixed = make_inputs(profiles=profiles, precision="bf16")
    return mixed.with_train(device_precision={"old": "fp16"})


def test_every_device_reads_the_table_of_its_precision(inputs: Inputs) -> None:
    cost = CostModel(inputs)
    assert cost.types["new"].attention(1).forward == pytest.approx(1.0)
    assert cost.types["old"].attention(1).forward == pytest.approx(4.0)
    assert cost.row_bytes == 2 * inputs.model.hidden_size
    embedded = embed(inputs)
    assert {name: [t.precision for t in p.tables] for name, p in embedded.profiles.items()} == {
        "new": ["bf16"],
        "old": ["fp16"],
    }


def test_rows_travel_in_the_trainings_precision(inputs: Inputs) -> None:
    narrow = inputs.with_train(precision="fp32", device_precision={"new": "bf16", "old": "fp16"})
    assert CostModel(narrow).row_bytes == 4 * inputs.model.hidden_size


def test_a_missing_table_names_the_devices_own_precision(inputs: Inputs) -> None:
    profiles = {**inputs.profiles, "old": make_profile("old", precision="bf16")}
    with pytest.raises(UserError, match=r"profile old: .* run `hetermoe profile --model synthetic --precision fp16`"):
        CostModel(inputs.model_copy(update={"profiles": profiles}))


def test_the_plan_says_what_is_exchanged(inputs: Inputs) -> None:
    note = "old computes in fp16, the others in bf16; rows and shared gradients travel in bf16"
    assert note in list(sources(CostModel(inputs)))
    train = inputs.train.model_copy(update={"device_precision": {"olb": "fp16"}})
    told = "train.device_precision names olb, which the cluster does not have"
    assert told in list(sources(CostModel(inputs.model_copy(update={"train": train}))))


def test_a_run_knows_the_precision_of_every_rank(inputs: Inputs) -> None:
    plan = make_plan(inputs, make_layout())
    run = RunSpec(plan=plan, folder="x", corpus_sha256="0", precision="bf16", steps=1)
    assert run.rank_precisions == ["bf16", "fp16"]
    emulation = {"executed": make_model(), "sequence_length": 8, "time_scale": 1.0}
    emulated = RunSpec.model_validate({**run.model_dump(), "precision": "fp32", "emulation": emulation})
    assert emulated.rank_precisions == ["fp32", "fp32"]


def test_files_without_the_field_stay_what_they_are() -> None:
    spec = parse(TrainSpec, SPEC, "train.yaml")
    assert "device_precision" not in spec.model_dump(mode="json")
    mixed = parse(TrainSpec, {**SPEC, "device_precision": {"V100": "fp16"}}, "train.yaml")
    assert mixed.model_dump(mode="json")["device_precision"] == {"V100": "fp16"}
    assert (mixed.precision_of("V100"), mixed.precision_of("A40")) == ("fp16", "bf16")


def test_fp64_is_not_mixed() -> None:
    with pytest.raises(UserError, match=r"train.yaml: .*device_precision: fp64 keeps fp64 optimizer states"):
        parse(TrainSpec, {**SPEC, "device_precision": {"V100": "fp64"}}, "train.yaml")
    with pytest.raises(UserError, match=r"train.yaml: .*device_precision"):
        parse(TrainSpec, {**SPEC, "device_precision": {"V100": "int8"}}, "train.yaml")
