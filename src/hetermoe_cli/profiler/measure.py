"""Time forward and backward of kernel groups apart, on CPU and CUDA by one path, and count what autograd keeps.

Caches are emptied before each: a layer's weights and rows are used once an iteration, not over and over.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.model.seed import Seed
from hetermoe_cli.profiler.spread import relative_spread

_OTHER_BYTES = 2**28  # several times a card's caches; of a server's last cache less leaves half a layer warm

Progress = Callable[[int, int], None]
"""Called with (visits done, visits in all)."""


@dataclass(frozen=True)
class Case:
    """One kernel group at one size: `leaves` makes fresh detached inputs, `forward` maps them to outputs.

    It is `parts` equal parts in one, of which a table keeps one's share.
    """

    label: str
    leaves: Callable[[], list[Tensor]]
    forward: Callable[[list[Tensor]], list[Tensor]]
    parts: int = 1


@dataclass(frozen=True)
class Effort:
    """How long to measure: each case is visited `visits` times, all cases in turn, so that noise spreads over them.

    A visit warms up once, then repeats until `visit_seconds` are timed, at least once and at most `visit_runs` times.
    """

    visits: int = 7
    visit_seconds: float = 0.03
    visit_runs: int = 8


QUICK = Effort(visits=5, visit_seconds=0.01)


@dataclass
class Samples:
    """Seconds of every timed run of one case."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def spread(self) -> float:
        """(75th - 25th percentile) / median of forward + backward."""
        return relative_spread([f + b for f, b in zip(self.forward, self.backward, strict=True)])


class Stopwatch:
    """Marks in time on `device`: CUDA events in stream order, or the host's monotonic clock."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Note this moment."""
        if self._stream is not None:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between neighbouring marks; waits for the device."""
        if self._stream is not None:
            self._events[-1].synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [end - start for start, end in zip(self._times, self._times[1:], strict=False)]


class Caches:
    """Fills a device's caches with something else, as other layers do between two uses of one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._other = torch.empty(_OTHER_BYTES, dtype=torch.uint8, device=device)

    def empty(self) -> None:
        """Nothing that was there is there after it."""
        self._other.zero_()


def measure(cases: Sequence[Case], device: torch.device, effort: Effort, progress: Progress | None) -> list[Samples]:
    """Samples of every case, in order. UserError (DOES_NOT_FIT) names a case that runs out of memory."""
    samples, caches = [Samples() for _ in cases], Caches(device)
    for visit in range(effort.visits):
        for index, case in enumerate(cases):
            try:
                _visit(case, caches, effort, samples[index])
            except RuntimeError as error:
                refuse_out_of_memory(case, error)
            if progress:
                progress(visit * len(cases) + index + 1, effort.visits * len(cases))
    return samples


def _visit(case: Case, caches: Caches, effort: Effort, samples: Samples) -> None:
    leaves = case.leaves()
    outputs = case.forward(leaves)
    gradients = [torch.ones_like(output) for output in outputs]
    Seed(outputs).backward(gradients)
    del outputs
    spent = 0.0
    for _ in range(effort.visit_runs):
        for leaf in leaves:
            leaf.grad = None
        watch = Stopwatch(caches.device)
        caches.empty()
        watch.mark()
        outputs = case.forward(leaves)
        watch.mark()
        caches.empty()
        watch.mark()
        Seed(outputs).backward(gradients)
        watch.mark()
        del outputs
        forward, _, backward = watch.seconds()
        samples.forward.append(forward)
        samples.backward.append(backward)
        spent += forward + backward
        if spent >= effort.visit_seconds:
            return


def saved_bytes(case: Case, parameters: Sequence[nn.Parameter]) -> int:
    """Bytes of the distinct storages alive between forward and backward: what autograd saved, and the leaves.

    Storages of `parameters` are not counted. UserError (DOES_NOT_FIT) if the case runs out of memory.
    """
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return kept[-1]

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept.extend(case.leaves())
            outputs = case.forward(kept[:])
    except RuntimeError as error:
        refuse_out_of_memory(case, error)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del outputs  # kept alive until here, so that no address is used twice
    return sum(storages.values())


def refuse_out_of_memory(case: Case, error: RuntimeError) -> NoReturn:
    """UserError if `error` says that memory ran out, else `error` itself."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        message = f"profile: {case.label} does not fit into the device's memory: leave this size out"
        raise UserError(message, ExitCode.DOES_NOT_FIT) from error
    raise error
