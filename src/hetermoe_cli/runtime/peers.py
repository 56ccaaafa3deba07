"""Other ranks that are gone: what calls to them raise then, and how long they wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)


class PeerLost(Exception):
    """Another rank is gone: this one can only leave."""


@contextmanager
def peer_errors() -> Iterator[None]:
    """Around collective or point-to-point calls: their failure means that a peer died."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"lost a peer: {' '.join(str(error).split())}") from error  # NCCL's cause is on later lines


def barrier() -> None:
    """Wait for all ranks; PeerLost if one is gone."""
    with peer_errors():
        dist.barrier()
