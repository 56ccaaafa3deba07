"""Events of a device become spans on the host's clock, whichever stream they were on; none without a trace."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hetermoe_cli.runtime.clocks.device_clock import DeviceClock
from hetermoe_cli.runtime.transfers.lanes import Handoff
from hetermoe_cli.schedule.action import parse_action


class FakeEvent:
    """Is passed when the device's own time reaches the next of `moments`."""

    moments: Iterator[float]

    def __init__(self, **options: Any) -> None:
        assert options == {"enable_timing": True}

    def record(self, stream: object) -> None:
        self.milliseconds = 1000 * next(self.moments)

    def elapsed_time(self, later: "FakeEvent") -> float:
        return later.milliseconds - self.milliseconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> DeviceClock:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = DeviceClock(1, torch.device("cuda", 0))
    clock.set_zero(time.monotonic())
    return clock


def test_spans_keep_the_device_s_distances(clock: DeviceClock) -> None:
    FakeEvent.moments = iter([100.0, 100.25, 100.125, 100.5, 101.0])
    start = clock.begin_step(4, record=True)
    began = clock.mark()
    clock.compute(parse_action("0AF0"), began, 0.0)
    handoff = Handoff(torch.empty(0), start=clock.mark(), end=clock.mark())
    clock.transferred(parse_action("0DF0"), handoff)
    clock.end_step(start)
    attention, dispatch = clock.spans
    assert (attention.name, attention.lane, attention.step, attention.rank) == ("0AF0", "compute", 4, 1)
    assert dispatch.lane == "to experts"
    assert attention.end - attention.start == pytest.approx(0.25)
    assert dispatch.start - attention.start == pytest.approx(0.125)
    assert dispatch.end - attention.start == pytest.approx(0.5)
    now = time.monotonic() - clock._zero - start  # the last event, at 101.0, is now
    assert attention.start == pytest.approx(now - 1.0, abs=0.05)


def test_without_a_trace_there_are_no_events(clock: DeviceClock) -> None:
    FakeEvent.moments = iter([])
    start = clock.begin_step(0, record=False)
    began = clock.mark()
    assert began is None
    clock.compute(parse_action("0AF0"), began, 0.0)
    clock.end_step(start)
    assert clock.spans == clock.timings == []
