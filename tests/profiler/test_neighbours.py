"""Processes that train beside a measurement."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hetermoe_cli.errors import UserError
from hetermoe_cli.profiler import neighbours as module
from hetermoe_cli.profiler.neighbours import default_neighbours, neighbours


def test_they_work_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(module.subprocess, "Popen", Noted)
    with neighbours(2):
        assert [one.poll() for one in started] == [None, None]
        before = [_cpu_ticks(one.pid) for one in started]
        while any(_cpu_ticks(one.pid) <= ticks for one, ticks in zip(started, before, strict=True)):
            assert [one.poll() for one in started] == [None, None]
    assert all(one.returncode is not None for one in started)


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])  # user and system


def test_one_that_dies_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="pass --neighbours 0"), neighbours(1):
        pass


def test_as_many_as_other_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    cpu = torch.device("cpu")
    assert [default_neighbours(cpu, threads) for threads in (1, 2, 8, 16)] == [7, 3, 0, 0]
    assert default_neighbours(torch.device("cuda", 0), 1) == 0
