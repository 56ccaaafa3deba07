"""Work beside a measurement: the workers of a machine share its caches, memory and clock, so a CPU is timed while the
others train as well."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hetermoe_cli.errors import UserError

_ROWS, _WIDTH = 1024, 512  # of a product that takes a few ms and does not fit the innermost caches
_READY = b"ready\n"


def default_neighbours(device: torch.device, threads: int) -> int:
    """As many as there are other cores for workers of `threads` threads; none of a GPU."""
    return max(0, (os.cpu_count() or 1) // threads - 1) if device.type == "cpu" else 0


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """`count` processes of one thread that train until the block ends."""
    command = [sys.executable, "-m", __name__]
    started = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(count)
    ]
    try:
        for one in started:
            assert one.stdout is not None
            if one.stdout.readline() != _READY:
                raise UserError("profile: a process that was to work beside the measurement died: pass --neighbours 0")
        yield
    finally:
        for one in started:
            one.kill()
            one.communicate()


def _train_for_ever() -> None:
    """Forward and backward of a layer, as long as whoever measures lives."""
    torch.set_num_threads(1)
    parent = os.getppid()
    layer, rows = torch.nn.Linear(_WIDTH, _WIDTH), torch.randn(_ROWS, _WIDTH)
    print(_READY.decode(), end="", flush=True)
    while os.getppid() == parent:
        torch.autograd.backward(torch.nn.functional.silu(layer(rows)).sum())


if __name__ == "__main__":
    _train_for_ever()
