"""report/placement.py: what the picture of a placement says. SVG keeps every text as a comment."""

import re
import struct
import sys

import pytest

from builders import make_inputs, make_layout, make_model, make_plan
from hetermoe_cli.errors import UserError
from hetermoe_cli.report.placement import COPIES, draw_placement
from hetermoe_cli.report.plan_table import rank_row
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Plan


def placed(nodes: list[tuple[str, int]], sequences: list[int], hosted: list[int], replicated: int = 0) -> Plan:
    model = make_model(layers=3, experts=sum(hosted) + replicated, top_k=1)
    inputs = make_inputs(nodes, model=model, global_batch_sequences=2 * sum(sequences))
    return make_plan(inputs, make_layout(sequences, hosted, replicated=replicated, layers=3))


def texts(plan: Plan) -> list[str]:
    return re.findall(r"<!-- (.*?) -->", draw_placement(plan, "a plan", "svg").decode())


def test_every_cell_ranks_and_types_are_named() -> None:
    plan = placed([("old", 1), ("new", 1), ("old", 1)], [0, 2, 1], [3, 1, 0], replicated=2)
    found = texts(plan)
    assert found.count("3") == 3 + 1  # three layers and the colour bar
    assert found.count("1+2") == 3
    assert found.count("0+2") == 3
    names = ["0: no attention", "2: 1 sequence", "1: 2 sequences"]  # old ones together, in the cluster's order
    assert [text for text in found if text in names] == names
    assert {"2 old", "1 new", "layer", "a plan", "copies of replicated experts"} <= set(found)


def test_only_ranks_with_copies_are_marked() -> None:
    marks = {
        replicated: draw_placement(placed([("new", 2)], [1, 0], [0, 3], replicated), "x", "svg").decode().count(COPIES)
        for replicated in (0, 1)
    }
    assert marks[0] == 0
    assert marks[1] > 0


def test_only_ranks_of_a_pipeline_stage_hold_its_copies() -> None:
    plan = placed([("new", 2)], [1, 1], [0, 0], replicated=2)
    layout = plan.layout.model_dump() | {"pipeline": [{"layers": 2, "ranks": [0]}, {"layers": 1, "ranks": [1]}]}
    inputs = plan.inputs.with_train(global_batch_sequences=2)
    assert texts(plan).count("0+2") == 6
    assert texts(make_plan(inputs, Layout.model_validate(layout))).count("0+2") == 3


def test_ranks_on_some_shifts_say_in_how_many_micro_batches() -> None:
    plan = placed([("new", 1), ("old", 2)], [2, 2, 0], [0, 1, 2])
    layout = plan.layout.model_dump() | {"shifts": [[0], [1], []]}
    plan = make_plan(plan.inputs.with_train(global_batch_sequences=4), Layout.model_validate(layout))
    names = {"0: 2 sequences in 1 of 2 micro-batches", "1: 2 sequences in 1 of 2 micro-batches", "2: no attention"}
    assert names <= set(texts(plan))
    assert [rank_row(plan, plan.layout, device)[2] for device in plan.inputs.devices()] == [
        "2 in 1 of 2 micro-batches",
        "2 in 1 of 2 micro-batches",
        "0",
    ]


def test_many_ranks_share_labels_and_carry_no_numbers() -> None:
    plan = placed([("new", 64), ("old", 64)], [1] * 48 + [2] * 16 + [0] * 64, [0] * 64 + [1] * 64, replicated=1)
    found = texts(plan)
    assert {"64 new", "64 old", "0-47: 1 sequence", "48-63: 2 sequences", "64-127: no attention"} <= set(found)
    assert "0+1" not in found
    width, height = struct.unpack(">II", draw_placement(plan, "a plan")[16:24])
    assert 1000 < width < 2500
    assert 400 < height < 2500


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'hetermoe\[plot\]'"):
        draw_placement(plan, "a plan")
