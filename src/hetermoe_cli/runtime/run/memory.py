"""How much memory a rank really takes: what its process (CPU) or torch's allocator (CUDA) held at most."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # sets VmHWM to VmRSS


class MemoryMeter:
    """Peaks above what was there when the meter was made: torch, process groups and text are up, the model is not.

    CPU: resident bytes of the process, so what malloc keeps after a free counts too, as it does for whoever shares the
    machine. CUDA: bytes of torch's allocator. `measured` is false where the system does not tell. Where it does not let
    the peak be reset, `step_peak` is that of the process from its start.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.measured = device.type == "cuda" or _STATUS.exists()
        self._reset()
        self.start = self._now() if self.measured else 0
        self.start_up_peak = self.step_peak = self.peak = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a training step."""
        self.note()
        if not self.step_peak:
            self.start_up_peak = self.peak
        self._reset()
        yield
        self.step_peak = max(self.step_peak, self._highest() - self.start)

    def note(self) -> None:
        """Take account of what happened since the last step: building, validation, checkpoints."""
        self.peak = max(self.peak, self.step_peak, self._highest() - self.start)

    def values(self) -> dict[str, int]:
        """Bytes for the run folder; empty where nothing was measured."""
        if not self.measured:
            return {}
        self.note()
        found = {
            "start_bytes": self.start,
            "start_up_peak_bytes": self.start_up_peak,
            "step_peak_bytes": self.step_peak,
            "peak_bytes": self.peak,
        }
        if self._device.type == "cuda":
            found["reserved_bytes"] = torch.cuda.max_memory_reserved(self._device)
        return found

    def _now(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else _status("VmRSS")

    def _highest(self) -> int:
        if not self.measured:
            return 0
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status("VmHWM")

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            return


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
