"""Board: a memory-mapped file on which the ranks of an emulated run (one machine) post times and row counts.

A stamp is valid for the step that is written after it. Two banks alternate, so that a rank which is a step ahead
overwrites nothing that another still reads.
"""

import os
import time
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hetermoe_cli.runtime.machine.peers import PeerLost, barrier, peer_errors
from hetermoe_cli.spec.world import World

_POLL_SECONDS = 0.0002
_POLLS_PER_CHECK = 500
_BANKS = 2


class Board:
    """Stamps [bank, task, world] in seconds and counts [bank, layer, micro-batch, world, experts + world] in real
    rows: for every expert, and to every rank of the copy.

    Ranks are processes; `tasks` hold all that some rank posts.
    """

    def __init__(self, path: Path, world: World, tasks: Iterable[Hashable], rank: int) -> None:
        """Collective: rank 0 creates the file, the others open it."""
        self._rank = rank
        self._task = {task: index for index, task in enumerate(dict.fromkeys(tasks))}
        stamps = (_BANKS, len(self._task), world.size)
        micro_batches = max(replica.layout.micro_batches for replica in world.replicas)
        counts = (_BANKS, world.layers, micro_batches, world.size, world.experts + world.size)
        sizes = [8 * int(np.prod(stamps)), 8 * int(np.prod(stamps)), 8 * int(np.prod(counts))]
        if rank == 0:
            path.write_bytes(bytes(sum(sizes)))
        barrier()
        memory = np.memmap(path, dtype=np.uint8, mode="r+", shape=(sum(sizes),))
        pids = torch.zeros(world.size, dtype=torch.int64)
        pids[rank] = os.getpid()
        with peer_errors():
            dist.all_reduce(pids)
        self._pids: list[int] = pids.tolist()
        if rank == 0:
            path.unlink()  # the mappings keep it alive
        self._stamps = memory[: sizes[0]].view(np.float64).reshape(stamps)
        self._valid_for = memory[sizes[0] : sizes[0] + sizes[1]].view(np.int64).reshape(stamps)
        self._counts = memory[sizes[0] + sizes[1] :].view(np.int64).reshape(counts)

    def post(self, step: int, task: Hashable, seconds: float) -> None:
        """This rank is ready for `task` at `seconds`."""
        place = (step % _BANKS, self._task[task], self._rank)
        self._stamps[place] = seconds
        self._valid_for[place] = step + 1  # written last: it vouches for the stamp

    def wait(self, step: int, task: Hashable, ranks: Sequence[int]) -> float:
        """The latest stamp of `ranks` for `task`; waits until all have posted."""
        bank, index = step % _BANKS, self._task[task]
        mine = list(ranks)
        polls = 0
        while not (self._valid_for[bank, index, mine] == step + 1).all():
            time.sleep(_POLL_SECONDS)
            polls += 1
            if polls % _POLLS_PER_CHECK == 0:
                self._check_alive(mine)
        return float(self._stamps[bank, index, mine].max())

    def _check_alive(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            try:
                os.kill(self._pids[rank], 0)
            except ProcessLookupError as error:
                raise PeerLost(f"lost a peer: rank {rank} is gone") from error

    def post_counts(self, step: int, layer: int, micro_batch: int, experts: list[int], ranks: list[int]) -> None:
        """This rank's rows for every expert and to every rank of its copy; must precede the post of the dispatch."""
        counts = [*experts, *ranks]
        self._counts[step % _BANKS, layer, micro_batch, self._rank, : len(counts)] = counts

    def counts(self, step: int, layer: int, micro_batch: int) -> NDArray[np.float64]:
        """[world, experts + world] real rows, the latter by rank within each copy."""
        found: NDArray[np.float64] = self._counts[step % _BANKS, layer, micro_batch].astype(np.float64)
        return found
