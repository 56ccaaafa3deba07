"""Latency and bandwidth of messages and all-reduces between two real worker processes on this machine -> LinkRecord.

Rank 0 bounces messages off rank 1; a one-way time is half a round trip. An all-reduce follows each. As workers exchange
rows: on CPUs through shared memory, a copy in and a copy out included (where that cannot be, gloo over the loopback
interface), or NCCL between the first two CUDA devices. `python -m hetermoe_cli.profiler.network RANK PORT
BACKEND SIZES REPEATS` is one worker.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date, timedelta
from typing import IO, TYPE_CHECKING, Literal, NamedTuple

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.spec.cluster import Link, LinkRecord

if TYPE_CHECKING:
    from torch import Tensor

    from hetermoe_cli.runtime.neighbours import Mail

Backend = Literal["gloo", "nccl"]
SIZES = tuple(4096 * 4**power for power in range(7))  # 4 KiB to 16 MiB
QUICK_SIZES = SIZES[:6]
NAMES: dict[Backend, str] = {"gloo": "cpu-pair", "nccl": "nccl-pair"}
_HOST = "127.0.0.1"
_WAIT = timedelta(seconds=60)  # for the other rank to start; importing torch takes seconds on a busy machine
_WARM_UP = 5
_POLL_SECONDS = 0.05


def measure_link(backend: Backend, sizes: Sequence[int] = SIZES, repeats: int = 40) -> LinkRecord:
    """Start two workers, time messages of `sizes` bytes, fit bytes / bandwidth + latency; the same of all-reduces.

    UserError (WORKER_DIED) with the worker's last line if one fails.
    """
    samples = run_pair(backend, sizes, repeats)
    latency, bandwidth = fit(sizes, [_usual(values) for values in samples.messages])
    _, ring = fit(sizes, [_usual(values) for values in samples.all_reduces])  # two ranks: 2 (m - 1) / m is 1
    return LinkRecord(
        name=NAMES[backend],
        source="measured",
        date=date.today(),
        link=Link(
            bandwidth_gigabytes_per_second=round(bandwidth / 1e9, 4),
            latency_microseconds=round(latency * 1e6, 2),
            all_reduce_gigabytes_per_second=round(ring / 1e9, 4),
        ),
        spread=round(statistics.median(_spread(values) for values in samples.messages), 4),
        comment=f"between two processes of one machine, {sizes[0]} to {sizes[-1]} bytes, first quartiles",
    )


class Samples(NamedTuple):
    """Seconds of every repeat, one list a size: one way of a message, and a whole all-reduce."""

    messages: list[list[float]]
    all_reduces: list[list[float]]


def run_pair(backend: Backend, sizes: Sequence[int], repeats: int) -> Samples:
    """What rank 0 saw. The two workers are gone when this returns."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # The store binds a port that the system picks and keeps it, so that no other process can take it in between.
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    tail = [str(store.port), backend, ",".join(map(str, sizes)), str(repeats)]
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
        workers = [_start([str(rank), *tail], outputs[rank], errors[rank]) for rank in range(2)]
        try:
            failed = _wait(workers)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if failed is not None:
            errors[failed].seek(0)
            last = (errors[failed].read().strip().splitlines() or ["it did not finish in time"])[-1]
            raise UserError(f"profile: network worker {failed}: {last}", ExitCode.WORKER_DIED)
        outputs[0].seek(0)
        result: list[list[list[float]]] = json.loads(outputs[0].read().strip().splitlines()[-1])
    return Samples(*result)


def _start(arguments: Sequence[str], output: IO[str], errors: IO[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hetermoe_cli.profiler.network", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback()}
    return subprocess.Popen(command, stdout=output, stderr=errors, text=True, env=environment)


def _wait(workers: Sequence[subprocess.Popen[str]]) -> int | None:
    """None once both have ended well, else the rank of the first that failed or is late."""
    deadline = time.monotonic() + 2 * _WAIT.total_seconds()
    while time.monotonic() < deadline:
        codes = [worker.poll() for worker in workers]
        if any(codes):
            return next(rank for rank, code in enumerate(codes) if code)
        if codes == [0, 0]:
            return None
        time.sleep(_POLL_SECONDS)
    return next(rank for rank, worker in enumerate(workers) if worker.poll() is None)


def loopback() -> str:
    """Name of the loopback interface; gloo else takes the one that the host name resolves to."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
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


def _spread(values: Sequence[float]) -> float:
    from hetermoe_cli.profiler.measure import relative_spread

    return relative_spread(values)


class _Pair:
    """What workers do with rows, on two ranks."""

    def __init__(self, rank: int, mail: "list[Mail]") -> None:
        self._rank, self._other, self._mail = rank, 1 - rank, mail[0] if mail else None

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

        from hetermoe_cli.runtime import local_sum

        if self._mail is None:
            dist.all_reduce(tensor)
        else:
            local_sum.all_reduce(self._mail, tensor, [0, 1], self._rank)


def bounce(rank: int, port: int, backend: Backend, sizes: Sequence[int], repeats: int) -> Samples:
    """One worker's part, as this rank saw it. Sizes take turns."""
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from hetermoe_cli.runtime.neighbours import connect

    store = TCPStore(_HOST, port, is_master=False, timeout=_WAIT)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=_WAIT)
    buffers = [torch.zeros(size // 4, dtype=torch.float32, device=device) for size in sizes]
    samples = Samples([[] for _ in sizes], [[] for _ in sizes])
    pair = _Pair(rank, connect([0, 1], 1, shares=True) if backend == "gloo" else [])

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for repeat in range(_WARM_UP + repeats):
        for index, buffer in enumerate(buffers):
            start = seconds()
            for turn in range(2):
                if turn == rank:
                    pair.send(buffer)
                else:
                    pair.receive(buffer)
            bounced = seconds()
            pair.all_reduce(buffer)
            if repeat >= _WARM_UP:
                samples.messages[index].append((bounced - start) / 2)
                samples.all_reduces[index].append(seconds() - bounced)
    dist.destroy_process_group()
    return samples


def main(arguments: Sequence[str]) -> None:
    """Run one worker; rank 0 prints the samples as one JSON line."""
    rank, port, backend, sizes, repeats = arguments
    kind: Backend = "nccl" if backend == "nccl" else "gloo"
    samples = bounce(int(rank), int(port), kind, [int(size) for size in sizes.split(",")], int(repeats))
    if int(rank) == 0:
        print(json.dumps(samples))


if __name__ == "__main__":
    main(sys.argv[1:])
