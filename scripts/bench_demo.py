"""Bars of a demo run: prediction, speed over EP, loss. All seconds are emulated (see demo.py)."""

import time
from typing import Any

import bars
from demo import ROOT, STEPS, demo, predicted_speed_up, speed_up


def measure() -> tuple[list[bars.Bar], dict[str, Any]]:
    """Run the demo once."""
    began = time.monotonic()
    result = demo(ROOT / "runs" / "bench-demo", STEPS)
    found = []
    for name, key in (
        ("balanced", "predicted"),
        ("balanced_ep", "predicted"),
        ("learned", "replayed"),
        ("learned_ep", "replayed"),
    ):
        nominal = result[name]["nominal_seconds"]
        error = abs(nominal["measured"] / nominal[key] - 1)
        found.append(bars.at_most(f"{name}: emulated iteration against {key}, relative error", error, 0.05))
    gain = speed_up(result, "balanced")
    expected = predicted_speed_up(result)
    learned = result["learned"]
    found += [
        bars.at_least("speed over EP, balanced router, emulated", gain, 1.5),
        bars.at_most("speed over EP against predicted, relative error", abs(gain / expected - 1), 0.05),
        bars.at_least("speed over EP, learned router, emulated", speed_up(result, "learned"), 1.5),
        bars.at_most("training loss, last step over first", learned["last_loss"] / learned["first_loss"], 0.65),
        bars.at_most("validation loss after the demo, nats a byte", learned["validation_loss"], 3.1),
        bars.is_true(
            "all emulated runs valid",
            all(result[n]["emulation_valid"] for n in ("learned", "learned_ep", "balanced", "balanced_ep")),
        ),
        bars.at_most("seconds of the demo", time.monotonic() - began, 240),
    ]
    return found, result


if __name__ == "__main__":
    bars.report(__doc__, measure)
