"""Peaks of this process, step by step."""

import torch

from hetermoe_cli.runtime.run.memory import MemoryMeter

MEGABYTE = 2**20


def test_a_step_counts_what_it_frees_and_the_run_what_came_between() -> None:
    meter = MemoryMeter(torch.device("cpu"))
    torch.ones(128 * MEGABYTE, dtype=torch.uint8)
    with meter.step():
        torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    assert 60 * MEGABYTE < meter.step_peak < 90 * MEGABYTE
    torch.ones(200 * MEGABYTE, dtype=torch.uint8)
    with meter.step():
        torch.ones(32 * MEGABYTE, dtype=torch.uint8)
    assert meter.step_peak < 90 * MEGABYTE
    values = meter.values()
    assert values["step_peak_bytes"] == meter.step_peak
    assert values["start_bytes"] > 0
    assert 120 * MEGABYTE < values["start_up_peak_bytes"] < 160 * MEGABYTE
    assert values["peak_bytes"] > 190 * MEGABYTE
