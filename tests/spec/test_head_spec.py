"""Layout.head: what it answers, what is refused, and how files hold it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from builders import make_layout, make_schedule, with_heads
from hetermoe_cli.spec.layout import Layout, in_both
from hetermoe_cli.spec.plan import Group

PLAIN = make_layout((2, 1, 0, 0), (0, 0, 2, 2), micro_batches=4).model_dump()


def apart(head: list[int], **changes: Any) -> Layout:
    return Layout.model_validate(PLAIN | {"head": head} | changes)


def test_questions_about_heads() -> None:
    layout = apart([1, 0, 0, 5])
    assert layout.head_ranks == layout.attending_at(layout.layers) == (0, 3)
    assert layout.attending_at(layout.layers - 1) == (0, 1)
    assert [layout.head_share(rank) for rank in range(4)] == pytest.approx([1 / 6, 0, 0, 5 / 6])
    assert [layout.head_sequences(rank) for rank in range(4)] == pytest.approx([0.5, 0, 0, 2.5])
    assert [layout.has_dense(rank) for rank in range(4)] == [True, True, False, True]
    assert layout.tokens_at(2, 100) == {0: range(16), 3: range(16, 100)}
    assert not layout.spans[-1].has_head
    assert (layout.borders, layout.border(layout.layers)) == (1, 0)


def test_without_a_head_apart_ranks_have_what_they_attend_to() -> None:
    layout = Layout.model_validate(PLAIN)
    assert layout.head_ranks == (0, 1)
    assert [layout.head_sequences(rank) for rank in range(4)] == [2, 1, 0, 0]
    assert layout.tokens_at(2, 96) == layout.tokens_at(1, 96) == {0: range(64), 1: range(64, 96)}
    assert layout.spans[-1].has_head
    assert layout.borders == 0
    assert "head" not in layout.model_dump()
    assert "head" not in Group.of(layout, [[0, 1, 2, 3]]).model_dump()


def test_a_plan_keeps_its_head() -> None:
    group = Group.of(apart([0, 0, 1, 2]), [[0, 1, 2, 3]])
    assert Group.model_validate(group.model_dump()).layout == apart([0, 0, 1, 2])


@pytest.mark.parametrize(
    ("head", "changes", "message"),
    [
        ([1, 0, 0], {}, "head: 3 ranks listed, sequences_per_rank has 4"),
        ([0, 0, 0, 0], {}, "head: at least one rank must compute it"),
        ([1, 1, 1, -1], {}, "greater than or equal to 0"),
        ([1, 1, 1, 1], {"schedule": make_schedule("zebra", 4, dense_state="full")}, "head: not with dense_state full"),
        ([1, 1, 1, 1], {"schedule": make_schedule("windowed", 4, passes="woven")}, "head: .* or woven passes"),
        (
            [1, 0, 1, 0],
            {
                "pipeline": [{"layers": 1, "ranks": [0, 2]}, {"layers": 1, "ranks": [1, 3]}],
                "sequences_per_rank": [1, 1, 0, 0],
                "placement": [
                    {"experts": [[], [], [0, 1, 2, 3], []], "replicated": []},
                    {"experts": [[], [], [], [0, 1, 2, 3]], "replicated": []},
                ],
            },
            "head: only ranks of the last pipeline stage can compute it",
        ),
    ],
)
def test_heads_that_no_layout_has(head: list[int], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        apart(head, **changes)


@given(with_heads(), st.integers(1, 40), st.data())
def test_every_token_has_one_rank_in_the_head(layout: Layout, length: int, data: st.DataObject) -> None:
    tokens, j = length * layout.sequences_per_micro_batch, data.draw(st.integers(0, layout.micro_batches - 1))
    before, after = layout.crossing(layout.layers, tokens, j)
    for side in (before, after):
        assert [token for own in side.values() for token in own] == list(range(tokens))
    assert tuple(after) == layout.head_ranks
    assert sum(map(layout.head_share, range(layout.world_size))) == pytest.approx(1)
    for one, own in before.items():
        for other, there in after.items():
            if in_both(own, there):
                assert layout.cross(layout.layers, one, other, j)
