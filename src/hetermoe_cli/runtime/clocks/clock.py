"""Clock: when tasks ran. The engine asks it after every task; emulation replaces it by a clock that stretches them."""

import time
from typing import Any, NamedTuple

from hetermoe_cli.runtime.transfers.dispatcher import Routing
from hetermoe_cli.runtime.transfers.lanes import Handoff
from hetermoe_cli.schedule.action import Action
from hetermoe_cli.trace import Span, display_name, lane_of

Mark = Any  # a moment: seconds on the monotonic clock, or what a subclass' `mark` returns
Moments = list[tuple[Action, float, float]]  # tasks with their start and end in seconds on the monotonic clock


class Timing(NamedTuple):
    """Seconds that a compute task took, and the rows of each local expert if it was one of experts."""

    action: Action
    seconds: float
    rows: list[int] | None


class Clock:
    """Real time: spans are what the machine took. Times are seconds on the machine's monotonic clock.

    `timings`: the compute tasks of the last step. `waits`: whether `transferred` may wait for other ranks, which the
    compute thread must not.
    """

    waits = False

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.starts: dict[int, float] = {}
        self.timings: list[Timing] = []
        self._zero = time.monotonic()
        self._pending: list[tuple[Action, Mark, Mark]] = []  # lanes append to it as well
        self._kept: list[tuple[int, float, Moments]] = []  # of steps, with when they began
        self._step = 0
        self._recording = False

    def set_zero(self, zero: float) -> None:
        """When the run started, seconds on the machine's monotonic clock: one moment for all ranks, as their traces are
        one."""
        self._zero = zero

    def go_on(self, earlier: "Clock") -> None:
        """Take over the zero and the spans of a clock that stops here, between two steps."""
        self._zero, self._kept, self.starts = earlier._zero, earlier._kept, earlier.starts

    def begin_step(self, step: int, record: bool) -> float:
        """Start an iteration, whose spans are kept if `record`; seconds since the run's start."""
        self._step, self._recording, self.timings = step, record, []
        return self.step_start() - self._zero

    def end_step(self, start: float) -> None:
        """Close an iteration; `start`: when its first rank began, seconds since the run's start."""
        if moments := self._moments():
            self._kept.append((self._step, self._zero + start, moments))
            self.starts[self._step] = start
        self._pending = []

    @property
    def spans(self) -> list[Span]:
        """Of all steps that were recorded."""
        return [
            Span(self.rank, lane_of(action), display_name(action), began - origin, ended - origin, step)
            for step, origin, moments in self._kept
            for action, began, ended in moments
        ]

    def step_start(self) -> float:
        """When this rank's iteration starts."""
        return time.monotonic()

    def mark(self) -> Mark:
        """This moment, for the work that is started next."""
        return time.monotonic()

    def compute(self, action: Action, began: Mark, arrived: float, rows: list[int] | None = None) -> None:
        """A compute task has just run.

        began: mark before its work; arrived: end of the transfer that it needed (0 if none); rows: per local expert.
        """
        ended = self.mark()
        if isinstance(ended, float):  # a moment on a device is known later only
            self.timings.append(Timing(action, ended - began, rows))
        self._span(action, began, ended)

    def counted(self, layer: int, micro_batch: int, routing: Routing) -> None:
        """This rank has routed its rows of (layer, micro-batch)."""

    def sent(self, action: Action) -> None:
        """Rows for `action` are about to be handed to a lane."""

    def transferred(self, action: Action, handoff: Handoff) -> None:
        """A lane has just finished `action`; handoff.start and .end are marks."""
        self._span(action, handoff.start, handoff.end)

    def synchronising(self) -> None:
        """This rank has finished its backward."""

    def synchronised(self, action: Action, began: Mark) -> None:
        """The gradient synchronisation has just ended."""
        self._span(action, began, self.mark())

    def _span(self, action: Action, start: Mark, end: Mark) -> None:
        """Keep a task of this step: others wait for what it has computed, so nothing else is done with it yet."""
        if self._recording:
            self._pending.append((action, start, end))

    def _moments(self) -> Moments:
        """This step's tasks."""
        return self._pending
