"""report/timeline.py: what a picture says. SVG keeps every text as a comment, so that it can be read here."""

import re
import struct
import sys

import pytest

from builders import make_cost, make_layout, make_model
from hetermoe_cli.errors import UserError
from hetermoe_cli.report.timeline import COLOURS, MAX_RANKS, Panel, draw_timeline
from hetermoe_cli.simulator import simulate
from hetermoe_cli.trace import Span, Trace

LAYOUT = make_layout((1, 0), (0, 4))
TRACE = simulate(make_cost(LAYOUT, model=make_model()))
LABELS = ["A40, attention", "V100, experts"]


def texts(picture: bytes) -> list[str]:
    """All texts of an SVG, in drawing order."""
    return re.findall(r"<!-- (.*?) -->", picture.decode())


def filled(picture: bytes, colour: str) -> int:
    """Shapes of an SVG that are filled with `colour`."""
    return len(re.findall(rf"fill: {colour}", picture.decode()))


def svg(*panels: Panel, labels: list[str] | None = None) -> bytes:
    return draw_timeline(panels or [Panel(TRACE, "simulated (x)")], labels or LABELS, "a plan", "svg")


def test_png_has_the_size_of_its_ranks() -> None:
    picture = draw_timeline([Panel(TRACE, "simulated")], LABELS, "a plan")
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    assert width == 2250
    both = draw_timeline([Panel(TRACE, "simulated"), Panel(TRACE, "measured")], LABELS, "a plan")
    assert struct.unpack(">II", both[16:24])[1] > 1.4 * height


def test_texts_tell_plan_origin_ranks_and_busy_shares() -> None:
    found = texts(svg())
    seconds = TRACE.seconds
    shares = [f"{share:.0%} busy" for share in TRACE.busy_share(2)]
    for text in ("a plan", f"simulated (x): {seconds:.2f} s an iteration", *shares):
        assert text in found
    assert {"rank 0: A40, attention", "rank 1: V100, experts", "to experts", "from experts"} <= set(found)
    assert "time since the start of the iteration [s]" in found


def test_bars_carry_layer_and_micro_batch() -> None:
    found = texts(svg())
    assert [found.count(f"{layer}.{j}") for layer in (0, 1) for j in (0, 1)] == [4] * 4  # A and E, forward, backward


def test_narrow_bars_carry_their_layer_once_a_run() -> None:
    spans = [
        Span(0, "compute", f"{layer}AF{j}", layer + j / 50, layer + (j + 1) / 50) for layer in (8, 9) for j in range(8)
    ]
    found = texts(svg(Panel(Trace("simulated", [*spans, Span(0, "compute", "optimizer 0", 19, 20)]), "simulated")))
    assert (found.count("8"), found.count("9")) == (1, 1)
    assert "8.0" not in found


def test_every_task_is_a_bar_in_its_colour_and_the_legend() -> None:
    picture = svg()
    counts = {name: filled(picture, colour) for name, colour in COLOURS.items()}
    for name in ("attention forward", "attention backward", "expert forward", "expert backward"):
        assert counts[name] == 4 + 4 + 1  # bars, the boxes behind their numbers, and the legend
    assert counts["head"] == 2 + 1
    assert counts["dispatch"] == counts["combine"] == 4 * 2 * 2 + 1  # both passes, at both ranks
    assert counts["other"] == 0
    assert set(texts(picture)) >= {"attention forward", "expert backward", "head", "dispatch", "combine", "waiting"}


def test_two_traces_share_the_time_axis() -> None:
    slower = Trace("measured", [s._replace(start=1.5 * s.start, end=1.5 * s.end) for s in TRACE.spans])
    found = texts(svg(Panel(TRACE, "simulated (x)"), Panel(slower, "measured")))
    seconds = 1.5 * TRACE.seconds
    assert f"measured: {seconds:.2f} s an iteration (1.500 times the one above)" in found
    assert found.count("time since the start of the iteration [s]") == 1
    assert found.count("0") == 1  # numbers of seconds stand below the lower panel only


def test_of_several_steps_the_median_one_is_drawn() -> None:
    steps = [
        s._replace(start=factor * s.start, end=factor * s.end, step=step)
        for step, factor in enumerate((1.0, 3.0, 2.0))
        for s in TRACE.spans
    ]
    assert f"measured: {2 * TRACE.seconds:.2f} s an iteration" in texts(
        svg(Panel(Trace("measured", steps), "measured"))
    )


@pytest.mark.parametrize(("world", "stated"), [(MAX_RANKS, False), (40, True)])
def test_more_than_16_ranks_are_drawn_as_a_stated_subset(world: int, stated: bool) -> None:
    spans = [Span(rank, "compute", "0AF0", 0.0, 1.0) for rank in range(world)]
    found = texts(svg(Panel(Trace("simulated", spans), "simulated"), labels=["x"] * world))
    ranks = [text for text in found if text.startswith("rank ")]
    assert len(ranks) == MAX_RANKS
    assert (ranks[0], ranks[-1]) == ("rank 0: x", f"rank {world - 1}: x")
    assert ("a plan; 16 of 40 ranks drawn" in found) is stated


def test_without_matplotlib_the_error_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'hetermoe\[plot\]'"):
        draw_timeline([Panel(TRACE, "simulated")], LABELS, "a plan")


def test_a_subset_has_a_rank_of_every_label() -> None:
    labels = ["attention"] * 40 + ["rare"] + ["experts"] * 59
    spans = [Span(rank, "compute", "0AF0", 0.0, 1.0) for rank in range(100)]
    found = texts(svg(Panel(Trace("simulated", spans), "simulated"), labels=labels))
    ranks = [text for text in found if text.startswith("rank ")]
    assert len(ranks) == MAX_RANKS
    assert {"rank 0: attention", "rank 40: rare", "rank 41: experts"} <= set(ranks)
