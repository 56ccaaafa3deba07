"""Trace: when every task ran, from the simulator and from the engine alike; Chrome-trace JSON."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Action, Kind
from hetermoe_cli.spec.files import read_text, write_atomic

Origin = Literal["simulated", "measured", "emulated"]
LANES = ("compute", "to experts", "from experts")


class Span(NamedTuple):
    """One task on one lane of one rank; seconds from the start of its iteration."""

    rank: int
    lane: str
    name: str
    start: float
    end: float
    step: int = 0


@dataclass
class Trace:
    """Spans with their origin, which every output states."""

    origin: Origin
    spans: list[Span] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """End of the last span."""
        return max((span.end for span in self.spans), default=0.0)

    def busy_share(self, world_size: int) -> list[float]:
        """Share of the iteration in which each rank computes."""
        busy = [0.0] * world_size
        for span in self.spans:
            if span.lane == "compute":
                busy[span.rank] += span.end - span.start
        return [value / self.seconds if self.seconds else 0.0 for value in busy]

    def chrome(self) -> dict[str, Any]:
        """Chrome-trace object: a process per rank, a thread per lane, microseconds."""
        events: list[dict[str, Any]] = []
        for rank in sorted({span.rank for span in self.spans}):
            events.append(_name("process_name", rank, 0, f"rank {rank} ({self.origin})"))
            events += [_name("thread_name", rank, index, lane) for index, lane in enumerate(LANES)]
        for span in self.spans:
            events.append(
                {
                    "name": span.name,
                    "cat": self.origin,
                    "ph": "X",
                    "pid": span.rank,
                    "tid": LANES.index(span.lane),
                    "ts": span.start * 1e6,
                    "dur": (span.end - span.start) * 1e6,
                    "args": {"step": span.step},
                }
            )
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"origin": self.origin}}

    def write(self, path: Path) -> None:
        """Write the Chrome trace atomically."""
        write_atomic(path, json.dumps(self.chrome()))


def read_trace(paths: Iterable[Path]) -> Trace:
    """Merge Chrome traces written by Trace.write; UserError if one does not parse."""
    trace: Trace | None = None
    for path in paths:
        try:
            data = json.loads(read_text(path))
            spans = [
                Span(
                    event["pid"],
                    LANES[event["tid"]],
                    event["name"],
                    event["ts"] / 1e6,
                    (event["ts"] + event["dur"]) / 1e6,
                    event["args"]["step"],
                )
                for event in data["traceEvents"]
                if event["ph"] == "X"
            ]
            origin = data["otherData"]["origin"]
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path}: not a trace written by hetermoe ({error})") from error
        trace = trace or Trace(origin)
        trace.spans += spans
    if trace is None:
        raise UserError("no trace files given")
    return trace


def lane_of(action: Action) -> str:
    """The lane that a task runs on."""
    if not action.is_transfer:
        return LANES[0]
    return LANES[1] if action.towards_experts else LANES[2]


def display_name(action: Action) -> str:
    """Task name for people and pictures; equal for simulator and engine."""
    words = {Kind.HEAD: "head", Kind.SYNCHRONISE: "synchronise", Kind.OPTIMIZER: "optimizer"}
    return words[action.kind] + f" {action.micro_batch}" if action.kind in words else str(action)


def _name(kind: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": lane, "args": {"name": name}}
