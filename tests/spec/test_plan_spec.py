"""spec/plan.py: coverage of experts, consistency with the inputs, hashes, and what a plan file refuses."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from builders import make_inputs, make_layout, make_model
from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.layout import LayerPlacement, Layout
from hetermoe_cli.spec.plan import Group, Plan
from hetermoe_cli.spec.schedule_choice import ScheduleChoice

ZEBRA = ScheduleChoice.zebra(2)


def layout_of(*placement: LayerPlacement, sequences: tuple[int, ...] = (1, 0)) -> Layout:
    return Layout(schedule=ZEBRA, sequences_per_rank=list(sequences), placement=list(placement))


def edited(plan: Plan, folder: Path, edit: Any) -> Path:
    """The plan as a file, with `edit` applied to its data."""
    path = folder / "plan.yaml"
    dump(plan, path)
    data = yaml.safe_load(path.read_text())
    edit(data)
    path.write_text(yaml.safe_dump(data))
    return path


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(Plan, path)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    "placement",
    [
        LayerPlacement(experts=[[0], [2, 3]]),  # 1 is missing
        LayerPlacement(experts=[[0, 1], [1, 2, 3]]),  # 1 is placed twice
        LayerPlacement(experts=[[0], [1, 2]], replicated=[2, 3]),  # 2 is hosted and replicated
        LayerPlacement(experts=[[], [1, 2, 3, 4]]),  # 0 is missing, 4 does not exist
    ],
)
def test_every_expert_must_be_placed_exactly_once(placement: LayerPlacement) -> None:
    with pytest.raises(ValidationError, match=r"placement\.0: every expert must be placed exactly once"):
        layout_of(placement)


def test_layers_must_have_the_same_experts() -> None:
    with pytest.raises(ValidationError, match="placed exactly once"):
        layout_of(LayerPlacement(experts=[[0], [1, 2]]), LayerPlacement(experts=[[0], [1]]))


def test_placement_must_list_every_rank() -> None:
    with pytest.raises(ValidationError, match=r"placement\.1\.experts: 3 ranks listed, sequences_per_rank has 2"):
        layout_of(LayerPlacement(experts=[[0], [1]]), LayerPlacement(experts=[[0], [1], []]))


def test_somebody_must_attend() -> None:
    with pytest.raises(ValidationError, match="at least one rank must attend"):
        layout_of(LayerPlacement(experts=[[0], [1]]), sequences=(0, 0))


def test_questions_that_a_layout_answers() -> None:
    layout = layout_of(
        LayerPlacement(experts=[[3], [0, 1], []], replicated=[2]),
        LayerPlacement(experts=[[], [0, 1, 2, 3], []]),
        sequences=(2, 0, 1),
    )
    assert (layout.world_size, layout.layers, layout.experts, layout.micro_batches) == (3, 2, 4, 2)
    assert layout.sequences_per_micro_batch == 3
    assert layout.attending == [0, 2]
    assert [layout.hosting(layer) for layer in (0, 1)] == [[0, 1], [1]]
    assert [layout.local_experts(0, rank) for rank in range(3)] == [[3, 2], [0, 1], [2]]
    assert [layout.local_experts(1, rank) for rank in range(3)] == [[], [0, 1, 2, 3], []]


@pytest.mark.parametrize(("name", "alive"), [("zebra", 3), ("sequential", 1)])
def test_micro_batches_alive(name: Any, alive: int) -> None:
    assert make_layout(micro_batches=3, schedule=name).schedule.window == alive


def test_a_plan_round_trips_through_its_file(plan: Plan, tmp_path: Path) -> None:
    dump(plan, tmp_path / "plan.yaml")
    again = load(Plan, tmp_path / "plan.yaml")
    assert again == plan
    assert again.layout == make_layout()
    again.verify("plan.yaml")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_layout((1, 0, 0), (0, 2, 2)), "groups: ranks must be below 2 and in one group each"),
        (make_layout(layers=3), "groups.0.placement: 3 layers of 4 experts, the model has 2 of 4"),
        (make_layout(hosted=(0, 5)), "groups.0.placement: 2 layers of 5 experts, the model has 2 of 4"),
        (make_layout((3, 0)), "groups: 6 sequences an iteration, train.global_batch_sequences is 2"),
    ],
)
def test_a_plan_must_fit_its_inputs(plan: Plan, other: Layout, words: str) -> None:
    fields = {name: getattr(plan, name) for name in Plan.model_fields}
    fields["groups"] = [Group.of(other, [list(range(other.world_size))])]
    with pytest.raises(ValidationError, match=words.replace(".", r"\.")):
        Plan(**fields)


EDITS: dict[str, Any] = {
    "model": lambda data: data["inputs"]["model"].update(rope_theta=5.0),
    "cluster": lambda data: data["inputs"]["cluster"]["nodes"][0]["network"].update(latency_microseconds=9.0),
    "train": lambda data: data["inputs"]["train"].update(seed=7),
    "profiles.old": lambda data: data["inputs"]["profiles"]["old"].update(memory_bytes=1),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_input_edited_after_planning_is_found(plan: Plan, tmp_path: Path, name: str) -> None:
    path = edited(plan, tmp_path, EDITS[name])
    with pytest.raises(UserError, match=rf"field inputs\.{name}: its hash does not match .* run `hetermoe plan` again"):
        load(Plan, path).verify(str(path))


def test_a_hash_that_is_missing_or_too_much_is_found(plan: Plan) -> None:
    hashes = dict(plan.inputs_sha256)
    del hashes["train"]
    with pytest.raises(UserError, match=r"field inputs\.train: its hash"):
        plan.model_copy(update={"inputs_sha256": hashes}).verify("plan.yaml")
    with pytest.raises(UserError, match=r"field inputs\.links\.x: its hash"):
        plan.model_copy(update={"inputs_sha256": {**plan.inputs_sha256, "links.x": "0"}}).verify("plan.yaml")


def test_hashes_do_not_depend_on_the_order_of_profiles() -> None:
    inputs = make_inputs()
    reversed_profiles = dict(reversed(list(inputs.profiles.items())))
    assert inputs.model_copy(update={"profiles": reversed_profiles}).hashes() == inputs.hashes()
    assert make_inputs(model=make_model(vocab_size=512)).hashes()["model"] != inputs.hashes()["model"]


def test_another_schema_version_of_a_plan_is_refused(plan: Plan, tmp_path: Path) -> None:
    path = edited(plan, tmp_path, lambda data: data.update(schema_version=2))
    assert error_of(path) == (
        "schema_version is 2, this hetermoe reads version 1: regenerate the file with this version"
    )


def test_another_schema_version_inside_a_plan_is_refused(plan: Plan, tmp_path: Path) -> None:
    path = edited(plan, tmp_path, lambda data: data["inputs"]["model"].update(schema_version=2))
    assert error_of(path) == "field inputs.model.schema_version: Input should be 1"


def test_an_unknown_field_deep_inside_is_named(plan: Plan, tmp_path: Path) -> None:
    path = edited(plan, tmp_path, lambda data: data["inputs"]["train"].update(colour="red"))
    assert error_of(path) == "field inputs.train.colour: unknown field: remove it or check its spelling"


def test_a_bad_placement_in_a_file_is_told_in_plain_words(plan: Plan, tmp_path: Path) -> None:
    path = edited(plan, tmp_path, lambda data: data["groups"][0]["placement"][0]["experts"][1].pop())
    assert error_of(path) == "field groups.0: placement.0: every expert must be placed exactly once"


def test_a_file_from_before_there_were_groups_is_one_group_over_all_ranks(plan: Plan, tmp_path: Path) -> None:
    def flatten(data: dict[str, Any]) -> None:
        (group,) = data.pop("groups")
        data.update({name: group[name] for name in Layout.model_fields.keys() - Layout.later})

    assert load(Plan, edited(plan, tmp_path, flatten)) == plan


def test_groups_are_distinct_ranks_of_the_cluster(plan: Plan) -> None:
    fields = {name: getattr(plan, name) for name in Plan.model_fields}
    group = plan.groups[0]
    with pytest.raises(ValidationError, match="in one group each"):
        Plan(**{**fields, "groups": [group, group]})
    with pytest.raises(ValidationError, match=r"replicas\.0: must be 2 different ranks in ascending order"):
        Group.of(plan.layout, [[1, 0]])
