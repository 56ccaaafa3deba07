"""Which lines of metrics.jsonl the progress shows."""

import json
import time
from pathlib import Path

from builders import make_plan
from hetermoe_cli.launch.progress import Follower
from hetermoe_cli.spec.run import RunSpec


def test_steps_that_an_earlier_start_did_are_not_shown_for_this_one(tmp_path: Path) -> None:
    run = RunSpec(plan=make_plan(), folder=str(tmp_path), corpus_sha256="0", precision="fp32", steps=3)
    metrics = tmp_path / "metrics.jsonl"
    old = {"event": "step", "step": 0, "time": time.time() - 60}
    metrics.write_text(json.dumps(old) + "\n")
    follower = Follower(run)
    assert follower._new_lines() == []
    new = old | {"time": time.time()}
    metrics.write_text(json.dumps(new) + "\n")
    assert follower._new_lines() == [new]
    assert follower._new_lines() == []


def test_a_broken_line_does_not_end_the_follower(tmp_path: Path) -> None:
    run = RunSpec(plan=make_plan(), folder=str(tmp_path), corpus_sha256="0", precision="fp32", steps=3)
    step = {"event": "step", "step": 0, "time": time.time() + 60}
    (tmp_path / "metrics.jsonl").write_text("nonsense\n[1]\n" + json.dumps(step) + "\n")
    assert Follower(run)._new_lines() == [step]
