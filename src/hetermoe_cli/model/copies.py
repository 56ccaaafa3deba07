"""Copies between host and device that do not make the thread which launches kernels wait for the device."""

import time
from typing import Any

import torch
from torch import Tensor


class Fetched:
    """A tensor on its way to the host: on CUDA into pinned memory, with an event behind it; on the CPU it is there.

    Any thread may `wait`; `waited` is the longest that one did, in seconds.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy, behind what the current stream has to do."""
        self.waited = 0.0
        self._event: Any = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor on the host."""
        if self._event is not None:
            began = time.monotonic()
            self._event.synchronize()
            self.waited = max(self.waited, time.monotonic() - began)
        return self._host


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, in the order of the current stream; the tensor itself if it is there."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def used_here(tensor: Tensor) -> Tensor:
    """Tell the allocator that the current stream works on a tensor of another one: its memory stays until then."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
