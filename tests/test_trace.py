"""trace.py: spans of several steps, Chrome-trace files and names."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from builders import make_cost, make_layout, make_model
from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import parse_action
from hetermoe_cli.simulator import simulate
from hetermoe_cli.trace import LANES, Span, Trace, display_name, lane_of, read_trace

TWO_STEPS = Trace(
    "measured",
    [
        Span(0, "compute", "0AF0", 0.0, 1.0, step=5),
        Span(1, "compute", "0EF0", 1.0, 3.0, step=5),
        Span(1, "to experts", "0DF0", 0.0, 3.0, step=5),
        Span(0, "compute", "synchronise 0", 3.0, 4.0, step=5),
        Span(0, "compute", "0AF0", 0.5, 2.0, step=6),
        Span(1, "compute", "0EF0", 1.0, 2.0, step=6),
    ],
)


def test_seconds_are_those_of_an_iteration() -> None:
    assert TWO_STEPS.step_seconds() == {5: 4.0, 6: 2.0}
    assert TWO_STEPS.seconds == 3.0
    assert Trace("simulated").seconds == 0.0


def test_an_odd_number_of_steps_gives_the_middle_one() -> None:
    spans = [Span(0, "compute", "0AF0", 0.0, end, step) for step, end in enumerate([1.0, 9.0, 2.0])]
    assert Trace("measured", spans).seconds == 2.0


def test_busy_share_counts_compute_over_all_steps() -> None:
    # Regression: the share of a trace of several steps was divided by one step and exceeded 1.
    assert TWO_STEPS.busy_share(3) == [2.5 / 6, 3.0 / 6, 0.0]
    assert Trace("simulated").busy_share(2) == [0.0, 0.0]


def test_chrome_trace_has_a_process_a_rank_and_a_thread_a_lane() -> None:
    data = TWO_STEPS.chrome()
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in data["traceEvents"] if e["name"] == "thread_name"}
    assert names == {(rank, index): lane for rank in (0, 1) for index, lane in enumerate(LANES[:4])}
    processes = {e["pid"]: e["args"]["name"] for e in data["traceEvents"] if e["name"] == "process_name"}
    assert processes == {0: "rank 0 (measured)", 1: "rank 1 (measured)"}
    event = next(e for e in data["traceEvents"] if e["name"] == "0DF0")
    assert event == {
        "name": "0DF0",
        "cat": "measured",
        "ph": "X",
        "pid": 1,
        "tid": 1,
        "ts": 0.0,
        "dur": 3e6,
        "args": {"step": 5, "iteration_start_seconds": 0.0},
    }


def test_events_of_a_lane_do_not_overlap() -> None:
    trace = simulate(make_cost(make_layout((1, 1, 0), (1, 1, 2)), model=make_model()))
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in trace.chrome()["traceEvents"]:
        if event["ph"] == "X":
            lanes.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for intervals in lanes.values():
        intervals.sort()
        assert all(a[1] <= b[0] + 1e-3 for a, b in itertools.pairwise(intervals))


def test_files_of_all_ranks_merge_to_the_whole_trace(tmp_path: Path) -> None:
    paths = []
    for rank in (0, 1):
        paths.append(tmp_path / f"rank{rank}.json")
        Trace("measured", [span for span in TWO_STEPS.spans if span.rank == rank]).write(paths[-1])
    merged = read_trace(paths)
    assert merged.origin == "measured"
    assert sorted(merged.spans) == sorted(TWO_STEPS.spans)


def written(folder: Path, edit: Any) -> Path:
    """TWO_STEPS as a file, with `edit` applied to its data."""
    path = folder / "trace.json"
    data = TWO_STEPS.chrome()
    edit(data)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.pop("otherData"),
        lambda data: data["otherData"].update(origin="guessed"),
        lambda data: data.pop("traceEvents"),
        lambda data: data["traceEvents"][-1].pop("dur"),
        lambda data: data["traceEvents"][-1].update(tid=7),
        lambda data: data["traceEvents"][-1].update(ts="soon"),
        lambda data: data["traceEvents"].append("event"),
    ],
)
def test_files_of_other_programs_are_refused(tmp_path: Path, edit: Any) -> None:
    path = written(tmp_path, edit)
    with pytest.raises(UserError, match=rf"{path}: not a trace written by hetermoe"):
        read_trace([path])


@pytest.mark.parametrize("text", ["{", "[]", "null", "3"])
def test_json_that_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not a trace written by hetermoe"):
        read_trace([path])


def test_traces_of_different_origins_do_not_mix(tmp_path: Path) -> None:
    TWO_STEPS.write(tmp_path / "rank0.json")
    Trace("simulated", TWO_STEPS.spans).write(tmp_path / "rank1.json")
    with pytest.raises(UserError, match=r"rank1.json: a trace of origin simulated, the files before it are measured"):
        read_trace([tmp_path / "rank0.json", tmp_path / "rank1.json"])


def test_no_files_are_no_trace() -> None:
    with pytest.raises(UserError, match="no trace files given"):
        read_trace([])


@pytest.mark.parametrize(
    ("text", "name", "lane"),
    [
        ("3AF1", "3AF1", "compute"),
        ("3EB1", "3EB1", "compute"),
        ("3DF1", "3DF1", "to experts"),
        ("3CF1", "3CF1", "from experts"),
        ("3CB1", "3CB1", "to experts"),
        ("3DB1", "3DB1", "from experts"),
        ("0HB1", "head 1", "compute"),
        ("0HF1", "head 1", "compute"),
        ("0SB0", "synchronise 0", "compute"),
        ("0OB0", "optimizer 0", "compute"),
    ],
)
def test_names_and_lanes(text: str, name: str, lane: str) -> None:
    assert (display_name(parse_action(text)), lane_of(parse_action(text))) == (name, lane)


def test_iterations_follow_each_other_in_the_chrome_trace_and_read_back_from_zero(tmp_path: Path) -> None:
    trace = Trace("measured", TWO_STEPS.spans, {5: 1.5, 6: 10.0})
    trace.write(tmp_path / "rank0.json")
    event = next(e for e in trace.chrome()["traceEvents"] if e["name"] == "0DF0")
    assert event["ts"] == 1.5e6
    back = read_trace([tmp_path / "rank0.json"])
    assert back.starts == {step: trace.starts[step] for step in {span.step for span in trace.spans}}
    for span, wanted in zip(back.spans, trace.spans, strict=True):
        assert span[:3] == wanted[:3]
        assert span.start == pytest.approx(wanted.start, abs=1e-9)
        assert span.end == pytest.approx(wanted.end, abs=1e-9)
