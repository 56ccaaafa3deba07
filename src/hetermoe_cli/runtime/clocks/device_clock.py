"""DeviceClock: when tasks ran on a CUDA device. Kernels run long after the host launched them, so events tell."""

import time

import torch

from hetermoe_cli.runtime.clocks.clock import Clock, Mark, Moments
from hetermoe_cli.runtime.machine.mesh import Mesh


class DeviceClock(Clock):
    """Spans by events of the streams that tasks run on, converted to the host's clock at the end of a traced step.

    Only traced steps have events, and wait for the device once more, after the optimizer. An iteration starts when its
    host does: the optimizer of the one before may still be running then.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        super().__init__(rank)
        self._device = device

    def mark(self) -> Mark:
        """An event on the current stream; None where nothing is recorded."""
        if not self._recording:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _moments(self) -> Moments:
        if not self._pending:
            return []
        last = self.mark()
        torch.cuda.synchronize(self._device)
        now = time.monotonic()
        found: Moments = []
        for action, began, ended in self._pending:
            start, end = (now - event.elapsed_time(last) / 1000 for event in (began, ended))
            found.append((action, start, end))
        return found


def make_clock(mesh: Mesh) -> Clock:
    """The clock that tells when tasks of this rank run."""
    return DeviceClock(mesh.process, mesh.device) if mesh.device.type == "cuda" else Clock(mesh.process)
