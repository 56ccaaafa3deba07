"""schedule/schedule.py, and golden schedules in golden/*.txt.

After an intended change of the order, regenerate the golden files and read their diff:

    PYTHONPATH=tests .venv/bin/python tests/schedule/test_schedule.py
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from builders import layouts, make_layout, parse_schedule
from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import parse_action
from hetermoe_cli.schedule.lower import _lowered, training_schedule, validation_schedule
from hetermoe_cli.schedule.schedule import Schedule, inputs, is_of_all
from hetermoe_cli.spec.layout import Layout

GOLDEN = Path(__file__).parent / "golden"
COMMAND = "PYTHONPATH=tests .venv/bin/python tests/schedule/test_schedule.py"
CASES = {
    "zebra_1_1": make_layout((1, 0), (0, 2)),
    "zebra_2_2_experts_on_attending_ranks": make_layout((1, 1, 0, 0), (1, 1, 2, 2)),
    "zebra_ep_2": make_layout((1, 1), (2, 2)),
    "sequential_1_1": make_layout((1, 0), (0, 2), schedule="sequential"),
    "zebra_2_1_states_shared_out": make_layout((1, 1, 0), (0, 0, 2), layers=3, dense_state="optimizer"),
    "windowed_2_1_fully_sharded": make_layout(
        (1, 1, 0), (0, 0, 2), layers=3, micro_batches=4, schedule="windowed", dense_state="full"
    ),
}


def golden_text(layout: Layout) -> str:
    """What the golden file of `layout` must hold."""
    schedule, choice = training_schedule(layout), layout.schedule
    header = (
        f"# {choice.name}, R = {choice.micro_batches}, {layout.layers} layers, sequences {layout.sequences_per_rank}, "
        f"experts {layout.placement[0].experts}\n# Regenerate: {COMMAND}\n"
    )
    return header + str(schedule)


@pytest.mark.parametrize("name", CASES)
def test_golden_schedule(name: str) -> None:
    assert golden_text(CASES[name]) == (GOLDEN / f"{name}.txt").read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


def test_layouts_that_differ_in_numbers_of_experts_have_one_schedule() -> None:
    layout = make_layout((1, 1, 0), (1, 0, 3), replicated=1)
    more, other = make_layout((2, 1, 0), (2, 0, 2), replicated=2), make_layout((1, 1, 0), (1, 1, 2), replicated=1)
    assert training_schedule(layout) is training_schedule(more)
    assert str(training_schedule(layout)) != str(training_schedule(other))
    assert str(training_schedule(layout)) != str(validation_schedule(layout))
    assert training_schedule(layout, 2) is not training_schedule(layout)


@given(layouts(), layouts())
def test_an_earlier_layout_leaves_no_trace_in_a_schedule(first: Layout, second: Layout) -> None:
    found = [str(training_schedule(layout, copies)) for layout in (first, second, first) for copies in (1, 2)]
    _lowered.cache_clear()
    assert [str(training_schedule(layout, copies)) for layout in (second, first) for copies in (1, 2)] == found[2:]


@given(layouts())
def test_text_round_trip(layout: Layout) -> None:
    for schedule in (training_schedule(layout), validation_schedule(layout)):
        assert str(parse_schedule(str(schedule))) == str(schedule)
        assert str(parse_schedule("# a comment\n\n" + str(schedule))) == str(schedule)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("rank 0: 0AF0\nrank 2: 0AF0\n", 2),  # rank 1 is missing
        ("rank x: 0AF0\n", 1),
        ("rank 0 0AF0\n", 1),
        ("rang 0: 0AF0\n", 1),
        ("rank 0: 0AF0\ntransfer 0DF0: 0 1\n", 2),
        ("rank 0: 0AF0\ntransfer 0DF0: 0 > a\n", 2),
    ],
)
def test_a_line_that_does_not_parse_is_named(text: str, number: int) -> None:
    with pytest.raises(UserError, match=f"schedule: line {number} does not parse"):
        parse_schedule(text)


def test_a_task_that_does_not_parse_is_named() -> None:
    with pytest.raises(UserError, match="'0AG0' is no action"):
        parse_schedule("rank 0: 0AF0 0AG0\n")


@pytest.mark.parametrize(
    ("action", "states", "together"),
    [
        ("1RB1", ("replicated", "optimizer"), True),
        ("1RB0", ("full", "full"), False),
        ("1GF0", ("optimizer", "optimizer"), True),
        ("2GF0", ("optimizer", "optimizer"), True),
        ("1GF0", ("full", "optimizer"), True),
        ("2GF0", ("full", "optimizer"), False),  # of the head each gathers its own
        ("1GF0", ("full", "replicated"), False),
        ("1GF1", ("full", "full"), False),
        ("1GB0", ("full", "full"), False),
        ("1DF0", ("optimizer", "optimizer"), False),
        ("1RB1", ("optimizer",), False),
    ],
)
def test_what_all_copies_do_together(action: str, states: tuple[Any, ...], together: bool) -> None:
    copies = [make_layout((1, 1), (2, 2), dense_state=state) for state in states]
    assert is_of_all(parse_action(action), copies[0], copies) is together


def test_transfers_of_a_rank_keep_the_order() -> None:
    schedule = parse_schedule(
        "rank 0: 0AF0\nrank 1: 0EF0\nrank 2: 0EF0\n"
        "transfer 0DF0: 0 > 1\ntransfer 0DF1: 0 > 2\ntransfer 0CF0: 1 > 0\ntransfer 0CF1: 2 > 0\n"
    )
    names = [[str(t) for t in schedule.transfers_of(rank)] for rank in range(3)]
    assert names == [["0DF0", "0DF1", "0CF0", "0CF1"], ["0DF0", "0CF0"], ["0DF1", "0CF1"]]


@pytest.mark.parametrize(
    ("action", "needs"),
    [
        ("0AF1", "0GF1"),
        ("2AF1", "1CF1 2XF1 2GF1"),
        ("2DF1", "2AF1"),
        ("2EF1", "2DF1 2GF1"),
        ("2CF1", "2EF1"),
        ("0HB1", "3CF1 4XF1 4GF1"),
        ("0HF1", "3CF1 4XF1 4GF1"),
        ("3CB1", "0HB1 4PB1"),
        ("4XB1", "0HB1"),
        ("4PB1", "4XB1"),
        ("2CB1", "3AB1 3PB1"),
        ("2PF1", "1CF1"),
        ("2XF1", "2PF1"),
        ("2XB1", "2AB1"),
        ("2PB1", "2XB1"),
        ("2EB1", "2CB1"),
        ("2DB1", "2EB1"),
        ("2AB1", "2DB1 2GB1"),
        ("2GB1", ""),
        ("4RB1", "0HB1"),
        ("0SB0", ""),
        ("0OB0", ""),
    ],
)
def test_inputs_of_a_task(action: str, needs: str) -> None:
    assert list(map(str, inputs(parse_action(action), layers=4))) == needs.split()


def test_world_size_counts_ranks_without_tasks() -> None:
    assert Schedule(((), ()), (), {}, {}).world_size == 2


if __name__ == "__main__":
    for case, layout in CASES.items():
        (GOLDEN / f"{case}.txt").write_text(golden_text(layout))
