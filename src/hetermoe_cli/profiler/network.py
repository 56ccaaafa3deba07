"""Latency and bandwidth of messages and all-reduces between two sides of real worker processes -> LinkRecord.

Sides are two workers of one machine, or all workers of two nodes (launch/link.py starts them). Each worker of side 0
bounces messages off its partner on side 1, all at once; a one-way time is half of the slowest round trip. An all-reduce
of all workers follows each. As workers exchange rows: NCCL between CUDA devices; between CPUs gloo, or inside one
machine shared memory, a copy in and a copy out included.

`python -m hetermoe_cli.profiler.network HOST PORT SEAT TASK` is one worker, the last two in JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

from hetermoe_cli.profiler.spread import relative_spread
from hetermoe_cli.spec.cluster import Link, LinkRecord

if TYPE_CHECKING:
    from torch import Tensor

    from hetermoe_cli.runtime.machine.neighbours import Mail

Backend = Literal["gloo", "nccl"]
SIZES = tuple(4096 * 4**power for power in range(7))  # 4 KiB to 16 MiB
QUICK_SIZES = SIZES[:6]
# What a NIC carries at once in training is longer; short messages may pass faster than it can go on for.
NODES_SIZES = (4096, *(2**20 * 4**power for power in range(4)))  # to 64 MiB
NODES_QUICK_SIZES = NODES_SIZES[:4]
NAMES: dict[Backend, str] = {"gloo": "cpu-pair", "nccl": "nccl-pair"}  # of links inside a machine
_WAIT = timedelta(seconds=60)  # for another worker to start; importing torch takes seconds on a busy machine
_WARM_UP = 2
_ENOUGH_SECONDS = 30.0  # on slow links
_FEWEST_REPEATS = 5


@dataclass(frozen=True)
class LinkTask:
    """What is measured. `width`: workers of a side, whose messages share `nics` NICs, over each of which `sizes` bytes
    go at once; `nodes`: 1 or 2."""

    backend: Backend
    nodes: int = 1
    width: int = 1
    nics: int = 1
    sizes: Sequence[int] = SIZES
    repeats: int = 40

    @property
    def where(self) -> str:
        """In words."""
        if self.nodes == 1:
            return "two processes of one machine"
        return f"two nodes, {self.backend}, {self.width} workers and {self.nics} NICs each, each NIC"

    @property
    def elements(self) -> list[int]:
        """Of one worker's messages of every size, four bytes each."""
        return [max(1, round(size * self.nics / self.width / 4)) for size in self.sizes]

    @property
    def reduced(self) -> list[float]:
        """Bytes that a ring all-reduce of every size moves over each of its links."""
        workers = 2 * self.width
        return [2 * (workers - 1) / workers * 4 * count for count in self.elements]


class Seat(NamedTuple):
    """A worker's: which side, its number there, and the CUDA device, if it has one."""

    side: int
    number: int
    device: int


class Samples(NamedTuple):
    """Seconds of every repeat, one list a size: one way of a message, and a whole all-reduce."""

    messages: list[list[float]]
    all_reduces: list[list[float]]


def link_record(task: LinkTask, name: str, samples: Samples) -> LinkRecord:
    """Fit bytes through a NIC / bandwidth + latency; the same of all-reduces, whose bytes count as in NCCL's tests."""
    latency, bandwidth = fit(task.sizes, [_usual(values) for values in samples.messages])
    _, ring = fit(task.reduced, [_usual(values) for values in samples.all_reduces])
    return LinkRecord(
        name=name,
        source="measured",
        date=date.today(),
        link=Link(
            bandwidth_gigabytes_per_second=round(bandwidth / 1e9, 4),
            latency_microseconds=round(latency * 1e6, 2),
            all_reduce_gigabytes_per_second=round(ring / 1e9, 4),
        ),
        spread=round(statistics.median(relative_spread(values) for values in samples.messages), 4),
        comment=f"between {task.where}, {task.sizes[0]} to {task.sizes[-1]} bytes, first quartiles",
    )


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes per second, least squares of the relative errors, latency >= 0.

    Minimises the sum over messages of ((latency + bytes / bandwidth) / seconds - 1)^2.
    """
    x = [size / t for size, t in zip(sizes, seconds, strict=True)]
    c = [1 / t for t in seconds]
    xx, xc, cc = (sum(a * b for a, b in zip(p, q, strict=True)) for p, q in ((x, x), (x, c), (c, c)))
    determinant = xx * cc - xc * xc
    slope = (sum(x) * cc - sum(c) * xc) / determinant if determinant > 0 else 0.0
    latency = (sum(c) - slope * xc) / cc
    if slope <= 0 or latency < 0:
        return 0.0, xx / sum(x)
    return latency, 1 / slope


def _usual(values: Sequence[float]) -> float:
    """The first quartile, not the median: two busy cores of a shared machine wake a receiver milliseconds late."""
    return statistics.quantiles(values, n=4, method="inclusive")[0]


class _Pair:
    """What workers do with rows, between two partners."""

    def __init__(self, rank: int, other: int, mail: "list[Mail]") -> None:
        self._rank, self._other, self._mail = rank, other, mail[0] if mail else None

    def send(self, tensor: "Tensor") -> None:
        import torch.distributed as dist

        if self._mail is None:
            dist.send(tensor, self._other)
        else:
            self._mail.show(self._other, self._mail.room(tensor).copy_(tensor))

    def receive(self, tensor: "Tensor") -> None:
        import torch.distributed as dist

        if self._mail is None:
            dist.recv(tensor, self._other)
        else:
            tensor.copy_(self._mail.shown(self._other, tensor))

    def all_reduce(self, tensor: "Tensor") -> None:
        import torch.distributed as dist

        from hetermoe_cli.runtime.machine import local_sum

        if self._mail is None:
            dist.all_reduce(tensor)
        else:
            local_sum.all_reduce(self._mail, tensor, [0, 1], self._rank)


def bounce(host: str, port: int, seat: Seat, task: LinkTask) -> Samples:
    """One worker's part; what side 0 saw, of each repeat the slowest. Sizes take turns. PeerLost if another is gone."""
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    from hetermoe_cli.runtime.machine.neighbours import connect
    from hetermoe_cli.runtime.machine.peers import peer_errors

    store = PrefixStore("link", TCPStore(host, port, is_master=False, timeout=_WAIT))
    device = torch.device("cuda", seat.device) if task.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, other = (side * task.width + seat.number for side in (seat.side, 1 - seat.side))
    buffers = [torch.zeros(count, dtype=torch.float32, device=device) for count in task.elements]
    within = task.backend == "gloo" and task.nodes == 1
    with peer_errors():
        dist.init_process_group(task.backend, store=store, rank=rank, world_size=2 * task.width, timeout=_WAIT)
        pair = _Pair(rank, other, connect([0, 1], 1, shares=True) if within else [])
        return _bounced(pair, seat, task, buffers)


def _bounced(pair: _Pair, seat: Seat, task: LinkTask, buffers: "Sequence[Tensor]") -> Samples:
    import torch
    import torch.distributed as dist

    device = buffers[0].device

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def of_all(value: "Tensor") -> "Tensor":
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    found: list[list[tuple[float, float]]] = []  # of every repeat and size
    first = seconds()
    for repeat in range(_WARM_UP + task.repeats):
        times = []
        for buffer in buffers:
            start = seconds()
            for turn in range(2):
                if turn == seat.side:
                    pair.send(buffer)
                else:
                    pair.receive(buffer)
            bounced = seconds()
            pair.all_reduce(buffer)
            times.append(((bounced - start) / 2, seconds() - bounced))
        if repeat >= _WARM_UP:
            found.append(times)
        late = torch.tensor(float(seconds() - first > _ENOUGH_SECONDS), device=device)
        if of_all(late) and len(found) >= _FEWEST_REPEATS:
            break
    own = torch.tensor(found, dtype=torch.float64, device=device) * (seat.side == 0)
    messages, all_reduces = of_all(own).cpu().permute(2, 1, 0).tolist()
    dist.destroy_process_group()
    return Samples(messages, all_reduces)


def worker_arguments(host: str, port: int, seat: Seat, task: LinkTask) -> list[str]:
    """Of `python`, to start one worker."""
    return ["-m", __name__, host, str(port), json.dumps(seat), json.dumps(asdict(task))]


def main(arguments: Sequence[str]) -> None:
    """Run one worker; the first prints the samples as one JSON line."""
    from hetermoe_cli.runtime.machine.leaving import follow_parent, leave_after
    from hetermoe_cli.runtime.machine.peers import PeerLost

    host, port, *told = arguments
    seat, task = Seat(*json.loads(told[0])), LinkTask(**json.loads(told[1]))
    follow_parent()
    try:
        samples = bounce(host, int(port), seat, task)
    except PeerLost as lost:
        leave_after(lost)
    if (seat.side, seat.number) == (0, 0):
        print(json.dumps(samples))


if __name__ == "__main__":
    main(sys.argv[1:])
