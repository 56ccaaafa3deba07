"""Ranks wait for one whose disk is slow, longer than for its messages, and still notice one that dies."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from workers import run_workers

from hetermoe_cli.spec.run import RunSpec
from run_builders import measured_plan

LIMIT = timedelta(seconds=1)  # of messages
SLOW_SECONDS = 2.5


def slow_second_rank(call: Callable[..., Any], rank: int) -> Callable[..., Any]:
    def slow(*args: Any) -> Any:
        time.sleep(SLOW_SECONDS * (rank == 1))
        return call(*args)

    return slow


def save_and_restore(rank: int, run: RunSpec, folder: str) -> int:
    from hetermoe_cli.runtime.machine import mesh
    from hetermoe_cli.runtime.run import saving
    from hetermoe_cli.runtime.step.trainer import Trainer

    mesh.TIMEOUT = LIMIT  # type: ignore[attr-defined]
    joined = mesh.join(run.world, "cpu")
    train = run.plan.inputs.train
    trainer = Trainer.build(
        run.model, run.world, train, joined, sequence_length=train.sequence_length, precision=run.precision
    )
    for name in ("write_shard", "load_tensors"):
        setattr(saving, name, slow_second_rank(getattr(saving, name), rank))
    saved = saving.save(run, trainer, 0)
    assert saved.is_relative_to(folder)
    saving.restore(run.model_copy(update={"resume_from": str(saved)}), trainer)
    return joined.agree(rank)[1]


def test_a_checkpoint_may_take_longer_than_a_message(tmp_path: Path) -> None:
    run = RunSpec(plan=measured_plan(), folder=str(tmp_path), corpus_sha256="0", precision="fp32", steps=1)
    assert run_workers(2, save_and_restore, run, str(tmp_path)) == [1, 1]


def lose_one(rank: int) -> None:
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.machine.peers import PeerLost

    joined, began = join(measured_plan().world, "cpu"), time.monotonic()
    if rank == 1:
        time.sleep(0.5)
        os._exit(9)
    with pytest.raises(PeerLost):
        joined.wait_for_disks()
    raise RuntimeError(f"lost after {time.monotonic() - began:.0f} s")


def test_a_rank_that_dies_meanwhile_is_noticed_at_once() -> None:
    with pytest.raises(
        AssertionError, match=r"rank 0: [^$]*RuntimeError: lost after [0-9] s\n*rank 1: the process died"
    ):
        run_workers(2, lose_one, timeout=60)


def waits(rank: int) -> list[timedelta]:
    from hetermoe_cli.runtime.machine.mesh import join

    mesh = join(measured_plan().world, "cpu")
    groups = [mesh.to_experts, mesh.from_experts, *mesh.shared.values()]
    return [group._get_backend(mesh.device).options._timeout for group in groups]


def test_every_group_waits_ten_minutes_for_a_message() -> None:
    for found in run_workers(2, waits):
        assert len(found) >= 2
        assert set(found) == {timedelta(minutes=10)}
