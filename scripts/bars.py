"""Bars of the benchmark scripts: {name, value, bar, holds}; `holds` is null where the run is missing."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

Bar = dict[str, Any]
SKIPPED = 77  # exit code of a benchmark whose device is not here


def at_most(name: str, value: float | None, limit: float) -> Bar:
    """value <= limit."""
    return {"name": name, "value": value, "bar": f"<= {limit}", "holds": None if value is None else value <= limit}


def at_least(name: str, value: float | None, limit: float) -> Bar:
    """value >= limit."""
    return {"name": name, "value": value, "bar": f">= {limit}", "holds": None if value is None else value >= limit}


def is_true(name: str, value: bool | None) -> Bar:
    """value is true."""
    return {"name": name, "value": value, "bar": "true", "holds": value}


def show(bars: list[Bar]) -> None:
    """One line a bar, on stderr."""
    marks = {True: "ok  ", False: "FAIL", None: "MISS"}
    for bar in bars:
        value = bar["value"]
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{marks[bar['holds']]} {bar['name']}: {text} (bar {bar['bar']})", file=sys.stderr)


def report(description: str | None, measure: Callable[[], tuple[list[Bar], dict[str, Any]]]) -> None:
    """main() of a benchmark: run it, show the bars, print one object with --json."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()
    bars, samples = measure()
    show(bars)
    if arguments.json:
        print(json.dumps({"bars": bars, "samples": samples}))
