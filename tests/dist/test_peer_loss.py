"""A rank that dies makes the others fail at once, not hang."""

import os
import time

import pytest
from test_engine_equality import CASES, LENGTH, MODEL, TRAIN, batches
from workers import run_workers


def work(rank: int) -> str:
    from hetermoe_cli.runtime.machine.mesh import join
    from hetermoe_cli.runtime.machine.peers import PeerLost
    from hetermoe_cli.runtime.step.trainer import Trainer

    case = CASES["2+1"]
    trainer = Trainer.build(
        MODEL, case.layout, TRAIN, join(case.layout, "cpu"), sequence_length=LENGTH, precision="fp64"
    )
    trainer.step(batches(), 0)
    if rank == 2:
        os._exit(9)
    began = time.monotonic()
    try:
        trainer.step(batches(), 1)
    except PeerLost:
        return f"lost after {time.monotonic() - began:.1f} s"
    return "went on alone"


def orphan(rank: int) -> None:
    from hetermoe_cli.runtime.machine import leaving
    from hetermoe_cli.spec.run import LAUNCHER

    os.environ[LAUNCHER] = "1"  # init: this process' parent is another, as if the launcher had died
    leaving.follow_parent()
    time.sleep(30)


def test_a_worker_whose_launcher_is_gone_ends() -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match="rank 0: the process died"):
        run_workers(1, orphan, timeout=30)
    assert time.monotonic() - began < 25


def survivor(rank: int) -> None:
    raise RuntimeError(work(rank))


def test_survivors_raise_peer_lost() -> None:
    with pytest.raises(AssertionError) as failure:  # rank 2 gives no answer, by design
        run_workers(3, survivor, timeout=60)
    text = str(failure.value)
    assert "rank 2: the process died" in text
    assert text.count("RuntimeError: lost after") == 2
