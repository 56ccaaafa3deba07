"""Trace: when every task ran, from the simulator and from the engine alike; Chrome-trace JSON."""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.spec.files import read_text, write_atomic

Origin = Literal["simulated", "measured", "emulated"]
LANES = ("compute", "to experts", "from experts", "collectives", "to next stage", "to stage before")
_WORDS = {Kind.HEAD: "head", Kind.SYNCHRONISE: "synchronise", Kind.OPTIMIZER: "optimizer"}


class Span(NamedTuple):
    """One task on one lane of one rank; seconds from the start of its iteration."""

    rank: int
    lane: str
    name: str
    start: float
    end: float
    step: int = 0


class Trace:
    """Spans with their origin, which every output states.

    `starts[step]`: when an iteration started, seconds from the start of the run, equal for all ranks (absent: 0).
    """

    def __init__(self, origin: Origin, spans: list[Span] | None = None, starts: dict[int, float] | None = None) -> None:
        self.origin: Origin = origin
        self.starts = {} if starts is None else starts
        self._spans = [] if spans is None else spans

    @property
    def spans(self) -> list[Span]:
        """Every task of every rank."""
        return self._spans

    def step_seconds(self) -> dict[int, float]:
        """End of the last span of every step."""
        ends: dict[int, float] = {}
        for span in self.spans:
            ends[span.step] = max(span.end, ends.get(span.step, 0.0))
        return ends

    @property
    def seconds(self) -> float:
        """Seconds of one iteration; of several steps the median."""
        return median(self.step_seconds().values() or [0.0])

    def busy_share(self, world_size: int) -> list[float]:
        """Share of all iterations in which each rank computes; synchronising is not computing."""
        busy = [0.0] * world_size
        for span in self.spans:
            if span.lane == LANES[0] and not span.name.startswith(_WORDS[Kind.SYNCHRONISE]):
                busy[span.rank] += span.end - span.start
        total = sum(self.step_seconds().values())
        return [value / total if total else 0.0 for value in busy]

    def chrome(self) -> dict[str, Any]:
        """Chrome-trace object: a process per rank, a thread per lane, microseconds; iterations follow each other."""
        events: list[dict[str, Any]] = []
        for rank in sorted({span.rank for span in self.spans}):
            events.append(_name("process_name", rank, 0, f"rank {rank} ({self.origin})"))
            lanes = {*LANES[:4], *(span.lane for span in self.spans if span.rank == rank)}
            events += [_name("thread_name", rank, index, lane) for index, lane in enumerate(LANES) if lane in lanes]
        for span in self.spans:
            began = self.starts.get(span.step, 0.0)
            events.append(
                {
                    "name": span.name,
                    "cat": self.origin,
                    "ph": "X",
                    "pid": span.rank,
                    "tid": LANES.index(span.lane),
                    "ts": (began + span.start) * 1e6,
                    "dur": (span.end - span.start) * 1e6,
                    "args": {"step": span.step, "iteration_start_seconds": began},
                }
            )
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"origin": self.origin}}

    def write(self, path: Path) -> None:
        """Write the Chrome trace atomically."""
        write_atomic(path, json.dumps(self.chrome()))


def read_trace(paths: Iterable[Path]) -> Trace:
    """Merge Chrome traces written by Trace.write; UserError if one does not parse or their origins differ."""
    trace: Trace | None = None
    for path in paths:
        try:
            data = json.loads(read_text(path))
            events = [event for event in data["traceEvents"] if event["ph"] == "X"]
            spans = [_span(event) for event in events]
            starts = {event["args"]["step"]: event["args"]["iteration_start_seconds"] for event in events}
            origin = data["otherData"]["origin"]
            if origin not in get_args(Origin):
                raise ValueError(f"origin {origin!r}")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path}: not a trace written by hetermoe ({error})") from error
        trace = trace or Trace(origin)
        if trace.origin != origin:
            raise UserError(f"{path}: a trace of origin {origin}, the files before it are {trace.origin}")
        trace.spans.extend(spans)
        trace.starts |= starts
    if trace is None:
        raise UserError("no trace files given")
    return trace


def _span(event: dict[str, Any]) -> Span:
    start = event["ts"] / 1e6 - event["args"]["iteration_start_seconds"]
    end = start + event["dur"] / 1e6
    return Span(event["pid"], LANES[event["tid"]], event["name"], start, end, event["args"]["step"])


def lane_of(action: Action) -> str:
    """The lane that a task runs on."""
    return LANES[action.lane]


def display_name(action: Action) -> str:
    """Task name for people and pictures; equal for simulator and engine."""
    word = _WORDS.get(action.kind)
    return f"{word} {action.micro_batch}" if word else str(action)


def _name(kind: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": lane, "args": {"name": name}}
