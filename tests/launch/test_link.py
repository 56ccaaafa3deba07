"""Two real processes over loopback, and what a link's record says of them."""

import statistics
import subprocess
from typing import Any

import pytest
import torch

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch import link
from hetermoe_cli.launch.link import measure_link
from hetermoe_cli.profiler.network import LinkTask, Samples, link_record

SIZES = (4096, 65536, 1048576, 8388608)


def test_a_link_between_two_processes_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide bounds: the machine may be busy; a wrong unit misses them by far."""
    found: list[Samples] = []
    monkeypatch.setattr(link, "link_record", lambda *known: found.append(known[-1]) or link_record(*known))
    record = measure_link(lambda: LinkTask("gloo", sizes=SIZES, repeats=10), "cpu-pair")
    assert record is not None
    assert (record.name, record.source) == ("cpu-pair", "measured")
    assert 0.05 < record.link.bandwidth_gigabytes_per_second < 100
    assert record.link.latency_microseconds < 50_000
    assert record.spread is not None
    assert record.link.all_reduce_gigabytes_per_second is not None
    assert 0.02 < record.link.all_reduce_gigabytes_per_second < 100
    for samples in found[0]:
        assert [len(values) for values in samples] == [10] * len(SIZES)
        small, *_, large = map(statistics.median, samples)
        assert 1e-6 < small < large
        assert SIZES[-1] / large < 100e9  # no loopback moves more bytes per second


def test_a_failed_worker_is_one_line_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    start = link._start

    def record(*arguments: Any) -> subprocess.Popen[str]:
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(link, "_start", record)
    with pytest.raises(UserError, match=r"network worker [01]: .*Error") as caught:
        measure_link(lambda: LinkTask("gloo", sizes=(2**50,), repeats=1), "too much")
    assert caught.value.code == ExitCode.WORKER_DIED
    assert len(started) == 2
    assert all(worker.poll() is not None for worker in started)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_nccl_between_two_gpus() -> None:
    record = measure_link(lambda: LinkTask("nccl", sizes=SIZES, repeats=10), "nccl-pair")
    assert record is not None
    assert record.link.bandwidth_gigabytes_per_second > 1
