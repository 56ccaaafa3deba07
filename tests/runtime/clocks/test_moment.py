"""What process 0 answers to those who ask for its time."""

import time

import pytest
import torch
import torch.distributed as dist

from hetermoe_cli.runtime.clocks import moment

CPU = torch.device("cpu")


def test_the_time_is_taken_once_the_question_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where, as with NCCL, recv returns before: only who reads the tensor waits."""
    now, answers = [0.0], []

    class Question(torch.Tensor):
        def item(self) -> float:
            now[0] += 1.0  # it comes
            return 0.0

    monkeypatch.setattr(torch, "empty", lambda *_, **__: Question())
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(dist, "recv", lambda *_: None)
    monkeypatch.setattr(dist, "send", lambda answer, to: answers.append((float(answer), to)))
    moment._answer(3, CPU)
    assert answers == [(float(number + 1), 3) for number in range(moment._EXCHANGES)]
