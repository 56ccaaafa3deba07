"""The moment that the traces of all ranks count from, each on the clock of its machine."""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from hetermoe_cli.runtime.machine.peers import peer_errors

_EXCHANGES = 32  # the one with the least round trip counts


def common_moment(wire: torch.device, nodes: Sequence[Sequence[int]] = ()) -> float:
    """When the last rank came here, in seconds on this machine's monotonic clock; one moment for all ranks.

    `nodes`: the processes of every machine, if there are several. Ranks of one machine share its clock; those of
    others are compared with process 0's once: the system's clock discipline keeps their rates alike for the few steps
    that are traced. `wire`: where messages lie. PeerLost if a rank is gone.
    """
    with peer_errors():
        offset = _offset(wire, nodes) if len(nodes) > 1 else 0.0
        latest = torch.tensor([time.monotonic() + offset], dtype=torch.float64, device=wire)
        dist.all_reduce(latest, op=dist.ReduceOp.MAX)
    return float(latest) - offset


def _offset(wire: torch.device, nodes: Sequence[Sequence[int]]) -> float:
    """Seconds by which the clock of process 0 is ahead of this machine's: off by half a round trip at most."""
    process = dist.get_rank()
    ahead = torch.zeros(len(nodes), dtype=torch.float64, device=wire)
    own = next(node for node, ranks in enumerate(nodes) if process in ranks)
    for node, (leader, *_) in enumerate(nodes):
        if leader and process == 0:
            _answer(leader, wire)
        elif leader and process == leader:
            ahead[node] = _ask(wire)
    dist.all_reduce(ahead)
    return float(ahead[own])


def _answer(leader: int, wire: torch.device) -> None:
    """Tell a machine's first process the time, as often as it asks."""
    for _ in range(_EXCHANGES):
        asked = torch.empty(1, dtype=torch.float64, device=wire)
        dist.recv(asked, leader)
        asked.item()  # waits for it, if it lies on a device
        dist.send(torch.tensor([time.monotonic()], dtype=torch.float64, device=wire), leader)


def _ask(wire: torch.device) -> float:
    """By how many seconds process 0 is ahead, as in NTP: its answer was written in the middle of the round trip."""
    found: list[tuple[float, float]] = []
    for _ in range(_EXCHANGES):
        there = torch.zeros(1, dtype=torch.float64, device=wire)
        asked = time.monotonic()
        dist.send(there, 0)
        dist.recv(there, 0)
        told = float(there)  # waits for it, if it lies on a device
        answered = time.monotonic()
        found.append((answered - asked, told - (asked + answered) / 2))
    return min(found)[1]
