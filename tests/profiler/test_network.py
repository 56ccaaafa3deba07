"""Two real processes over loopback, and the fit of their times."""

import statistics
import subprocess
from typing import Any

import pytest
import torch

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.profiler import network
from hetermoe_cli.profiler.network import fit, measure_link, run_pair

SIZES = (4096, 65536, 1048576, 8388608)


def test_a_link_between_two_processes_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide bounds: the machine may be busy; a wrong unit misses them by far."""
    found: list[network.Samples] = []
    monkeypatch.setattr(network, "run_pair", lambda *arguments: found.append(run_pair(*arguments)) or found[-1])
    record = measure_link("gloo", SIZES, repeats=10)
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
    start = network._start

    def record(*arguments: Any) -> subprocess.Popen[str]:
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(network, "_start", record)
    with pytest.raises(UserError, match=r"profile: network worker [01]: .*RuntimeError") as caught:
        run_pair("gloo", (-1,), repeats=1)
    assert caught.value.code == ExitCode.WORKER_DIED
    assert len(started) == 2
    assert all(worker.poll() is not None for worker in started)


def test_fit_recovers_an_exact_line() -> None:
    seconds = [20e-6 + size / 1.5e9 for size in SIZES]
    latency, bandwidth = fit(SIZES, seconds)
    assert latency == pytest.approx(20e-6)
    assert bandwidth == pytest.approx(1.5e9)


def test_fit_weighs_small_messages_as_much_as_large_ones() -> None:
    """One large message 20 % late must not swallow a latency that all small ones show."""
    seconds = [100e-6 + size / 1e9 for size in SIZES]
    latency, _ = fit(SIZES, [*seconds[:-1], 1.2 * seconds[-1]])
    assert latency == pytest.approx(100e-6, rel=0.2)


@pytest.mark.parametrize("seconds", [(1e-6, 3e-6), (1e-6, 1e-6)])
def test_fit_has_no_negative_latency_and_a_finite_bandwidth(seconds: tuple[float, float]) -> None:
    """Times that grow faster than the size, and times that do not grow."""
    latency, bandwidth = fit((1000, 2000), seconds)
    assert latency >= 0
    assert 0 < bandwidth < 1e12


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_nccl_between_two_gpus() -> None:
    record = measure_link("nccl", SIZES, repeats=10)
    assert record.name == "nccl-pair"
    assert record.link.bandwidth_gigabytes_per_second > 1
