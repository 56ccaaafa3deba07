"""Which cores a worker on the CPU computes on."""

import os
from collections.abc import Collection


def own_cores(allowed: Collection[int], worker: int, workers: int, threads: int) -> set[int]:
    """Cores of one of a node's `workers` with `threads` each: its share where all are needed, else all that are
    allowed, as another run may have the rest."""
    if workers * threads != len(allowed):
        return set(allowed)
    return set(sorted(allowed)[worker * threads : (worker + 1) * threads])


def bind(threads: int) -> None:
    """Keep this process on its cores: a thread that is woken on another worker's core waits there for its turn."""
    if hasattr(os, "sched_setaffinity"):
        worker, workers = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        os.sched_setaffinity(0, own_cores(os.sched_getaffinity(0), worker, workers, threads))
