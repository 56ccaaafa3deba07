"""The fit of a link's times, and what of a task it is made of."""

import pytest

from hetermoe_cli.profiler.network import LinkTask, Samples, fit, link_record

SIZES = (4096, 65536, 1048576, 8388608)


def test_workers_share_the_nics_of_their_node() -> None:
    """Bytes count as they pass a NIC, those of an all-reduce as NCCL's tests count them."""
    task = LinkTask("nccl", nodes=2, width=8, nics=2, sizes=SIZES)
    assert task.elements == [size // 16 for size in SIZES]  # of four bytes, a quarter of what a NIC carries
    messages = [[10e-6 + size / 5e9] * 4 for size in SIZES]
    all_reduces = [[2 * 15 / 16 * 4 * count / 3e9] * 4 for count in task.elements]
    record = link_record(task, "net", Samples(messages, all_reduces))
    assert (record.name, record.source, record.spread) == ("net", "measured", 0.0)
    assert record.link.bandwidth_gigabytes_per_second == pytest.approx(5)
    assert record.link.latency_microseconds == pytest.approx(10)
    assert record.link.all_reduce_gigabytes_per_second == pytest.approx(3)
    assert "two nodes, nccl, 8 workers and 2 NICs each" in record.comment


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
