"""Layout.shifts: what they answer, what is refused, and how files hold them."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from builders import make_inputs, make_layout, make_model, make_plan, make_schedule
from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Group, Plan

SHIFTS = [[0, 1, 3], [2], [2], [0, 1, 2, 3], []]
PLAIN = make_layout((2, 1, 1, 1, 0), (0, 0, 1, 1, 2), micro_batches=4, schedule="windowed").model_dump()


def shifted(**changes: Any) -> Layout:
    return Layout.model_validate(PLAIN | {"shifts": SHIFTS} | changes)


def test_questions_about_shifts() -> None:
    layout = shifted()
    assert layout.sequences_per_micro_batch == 3
    assert [layout.crew(1, j) for j in range(4)] == [(0, 3), (0, 3), (1, 2, 3), (0, 3)]
    assert layout.sequences_of(layout.spans[0], 1) == {0: range(2), 3: range(2, 3)}
    assert layout.sequences_of(layout.spans[0], 2) == {1: range(1), 2: range(1, 2), 3: range(2, 3)}
    assert [layout.on_shift(rank) for rank in range(5)] == [3, 1, 1, 4, 0]
    assert [layout.on_shift_at_once(rank) for rank in range(5)] == [2, 1, 1, 2, 0]  # of windows of two
    assert layout.attending == [0, 1, 2, 3]


def test_without_shifts_all_attend_in_all_micro_batches() -> None:
    layout = Layout.model_validate(PLAIN)
    assert [layout.crew(1, j) for j in range(4)] == [(0, 1, 2, 3)] * 4
    assert (layout.on_shift(0), layout.on_shift_at_once(0)) == (4, 2)
    assert layout.sequences_of(layout.spans[0], 2) == layout.sequences_of(layout.spans[0])


def test_a_copy_with_other_shifts_has_other_crews() -> None:
    layout = shifted()
    assert layout.crew(0, 2) == (1, 2, 3)
    other = layout.model_copy(update={"shifts": [[0, 1], [2, 3], [2, 3], [0, 1, 2, 3], []]})
    assert other.crew(0, 3) == (1, 2, 3)


NOT_WITH = "shifts: not with pipeline stages, dense_state full or woven passes"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": [{"layers": 2, "ranks": [0, 1, 2, 3, 4]}]}, NOT_WITH),
        ({"schedule": make_schedule("windowed", 4, dense_state="full")}, NOT_WITH),
        ({"schedule": make_schedule("windowed", 4, passes="woven")}, NOT_WITH),
        ({"placement": [{"experts": [[], [], [0], [1], [2]], "replicated": [3]}] * 2}, "not with replicated experts"),
        ({"shifts": SHIFTS[:4]}, "shifts: 4 ranks listed, sequences_per_rank has 5"),
        ({"shifts": [[0, 3, 1], *SHIFTS[1:]]}, r"shifts\.0: must be numbers of micro-batches, below 4, ascending"),
        ({"shifts": [[0, 0, 3], *SHIFTS[1:]]}, r"shifts\.0: must be numbers of micro-batches, below 4, ascending"),
        ({"shifts": [[0, 1, 4], *SHIFTS[1:]]}, r"shifts\.0: must be numbers of micro-batches, below 4, ascending"),
        ({"shifts": [*SHIFTS[:4], [1]]}, r"shifts\.4: must name micro-batches where, and only where, the rank attends"),
        ({"shifts": [*SHIFTS[:3], [], []]}, r"shifts\.3: must name micro-batches where, and only where"),
        ({"shifts": [[0, 1], *SHIFTS[1:]]}, "shifts: micro-batches have from 1 to 3 sequences, must be equal"),
        ({"shifts": [[0, 1, 2], [2], [2], [0, 1, 2], []]}, "shifts: micro-batches have from 0 to 5 sequences"),
    ],
)
def test_shifts_that_no_layout_has(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        shifted(**changes)


def test_a_plan_keeps_its_shifts_in_a_file(tmp_path: Path) -> None:
    inputs = make_inputs([("new", 3), ("old", 2)], model=make_model(), global_batch_sequences=12)
    plan = make_plan(inputs, shifted())
    dump(plan, tmp_path / "plan.yaml")
    assert "shifts:" in (tmp_path / "plan.yaml").read_text()
    again = load(Plan, tmp_path / "plan.yaml")
    assert again == plan
    assert again.layout.shifts == SHIFTS
    assert again.groups[0].sequences == 12
    assert Group.model_validate_json(plan.groups[0].model_dump_json()) == plan.groups[0]


def test_a_layout_without_shifts_has_no_such_field() -> None:
    group = Group.of(Layout.model_validate(PLAIN), [[0, 1, 2, 3, 4]])
    assert "shifts" not in group.model_dump()
    assert "shifts" not in group.model_dump_json()
    assert Group.model_validate(group.model_dump()) == group
