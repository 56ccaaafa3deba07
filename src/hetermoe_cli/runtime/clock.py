"""Clock: when tasks ran. The engine asks it after every task; emulation replaces it by a clock that stretches them."""

import time

from hetermoe_cli.runtime.lanes import Handoff
from hetermoe_cli.schedule.action import Action
from hetermoe_cli.trace import Span, display_name, lane_of


class Clock:
    """Real time: spans are what the machine took. Times are seconds on the machine's monotonic clock."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.spans: list[Span] = []
        self.starts: dict[int, float] = {}
        self._zero = time.monotonic()
        self._pending: list[Span] = []
        self._step = 0
        self._recording = False

    def set_zero(self) -> None:
        """The run starts now; all ranks call this together."""
        self._zero = time.monotonic()

    def begin_step(self, step: int, record: bool) -> float:
        """Start an iteration, whose spans are kept if `record`; seconds since the run's start."""
        self._step, self._recording = step, record
        return self.step_start() - self._zero

    def end_step(self, start: float) -> None:
        """Close an iteration; `start`: when its first rank began, seconds since the run's start."""
        origin = self._zero + start
        self.spans += [span._replace(start=span.start - origin, end=span.end - origin) for span in self._pending]
        if self._pending:
            self.starts[self._step] = start
        self._pending = []

    def step_start(self) -> float:
        """When this rank's iteration starts."""
        return time.monotonic()

    def compute(self, action: Action, began: float, arrived: float, rows: list[int] | None = None) -> None:
        """A compute task has just run.

        began: when its work started; arrived: end of the transfer that it needed (0 if none); rows: per local expert.
        """
        self._record(action, began, time.monotonic())

    def counted(self, layer: int, micro_batch: int, counts: list[int]) -> None:
        """This rank's rows per expert of (layer, micro-batch) are known."""

    def sent(self, action: Action) -> None:
        """Rows for `action` are about to be handed to a lane."""

    def transferred(self, action: Action, handoff: Handoff) -> None:
        """A lane has just finished `action`; handoff.start and .end are real times."""
        self._record(action, handoff.start, handoff.end)

    def synchronising(self) -> None:
        """This rank has finished its backward."""

    def synchronised(self, action: Action, began: float) -> None:
        """The gradient synchronisation has just ended."""
        self._record(action, began, time.monotonic())

    def _record(self, action: Action, start: float, end: float) -> None:
        if self._recording:
            self._pending.append(Span(self.rank, lane_of(action), display_name(action), start, end, self._step))
