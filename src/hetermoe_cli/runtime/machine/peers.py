"""Other ranks that are gone: what calls to them raise then, and how long they wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)
# For ranks with more of a checkpoint, or a slower disk. It is not what finds a dead one: gloo does when its connection
# ends, the launchers do when a worker or a node is gone.
DISK_TIMEOUT = timedelta(hours=6)
_OWN_FAILURES = ("unhandled cuda error", "invalid usage")  # as NCCL words its codes; no memory for its buffers is one


class PeerLost(Exception):
    """Another rank is gone: this one can only leave."""


@contextmanager
def peer_errors() -> Iterator[None]:
    """Around collective or point-to-point calls: their failure means that a peer died, unless it is this rank's own
    device's, which tells of kernels that failed before in whatever is called next, or NCCL's own on it."""
    try:
        yield
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        if any(words in str(error) for words in _OWN_FAILURES):
            raise
        raise PeerLost(f"lost a peer: {' '.join(str(error).split())}") from error  # NCCL's cause is on later lines


def barrier() -> None:
    """Wait for all ranks; PeerLost if one is gone."""
    with peer_errors():
        dist.barrier()
