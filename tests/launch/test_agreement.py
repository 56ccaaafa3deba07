"""All nodes run what node 0 wrote, or none does."""

import threading
import time
from pathlib import Path

import pytest
from test_meeting import meet

from builders import make_plan
from hetermoe_cli.errors import UserError
from hetermoe_cli.launch import agreement
from hetermoe_cli.launch.agreement import agreed_run
from hetermoe_cli.launch.local import claimed, trace
from hetermoe_cli.launch.succession import Succession, find_succession
from hetermoe_cli.spec.run import RunSpec


def a_run(folder: Path, **changes: object) -> RunSpec:
    return RunSpec(plan=make_plan(), folder=str(folder), corpus_sha256="0", precision="fp32", steps=3).model_copy(
        update=changes
    )


def test_all_nodes_read_the_run_that_node_0_wrote(tmp_path: Path) -> None:
    results = meet(
        lambda found: agreed_run(found, lambda: a_run(tmp_path, start_step=2)),
        lambda found: agreed_run(found, lambda: a_run(tmp_path)),
    )
    assert results == [a_run(tmp_path, start_step=2)] * 2


def test_folders_that_are_not_shared_and_other_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_SHARED_SECONDS", 0.5)
    results = meet(
        lambda found: agreed_run(found, lambda: a_run(tmp_path / "a")),
        lambda found: agreed_run(found, lambda: a_run(tmp_path / "b")),
    )
    assert results[0] == (3, f"node 1: {tmp_path}/b/run.yaml: node 1 does not see what node 0 wrote: put --run-folder "
                             "on a file system that all nodes share, under one path")  # fmt: skip
    results = meet(
        lambda found: agreed_run(found, lambda: a_run(tmp_path / "a")),
        lambda found: agreed_run(found, lambda: a_run(tmp_path / "a", steps=4)),
    )
    assert "field steps: node 1 was started with another one than node 0" in str(results[1])


def test_a_folder_in_which_a_run_is_at_work_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def start() -> list[object]:
        return meet(
            lambda found: agreed_run(found, lambda: a_run(folder)),
            lambda found: agreed_run(found, lambda: a_run(folder)),
        )

    with claimed(folder):
        busy = "another `hetermoe train` is at work in it: wait for its end, or name another --run-folder"
        assert start()[0] == (3, f"{folder}: {busy}")
        assert not (folder / "run.yaml").exists()
    assert start() == [a_run(folder)] * 2
    assert start() == [a_run(folder)] * 2  # a claim ends with its meeting


def test_a_run_that_goes_on_is_not_taken_over(tmp_path: Path) -> None:
    before = trace(tmp_path)
    with claimed(tmp_path, 60.0, before):
        threading.Timer(0.5, lambda: (tmp_path / "metrics.jsonl").write_text("step\n")).start()
        began = time.monotonic()
        with pytest.raises(UserError, match="another `hetermoe train` is at work"), claimed(tmp_path, 60.0, before):
            pass
        assert time.monotonic() - began < 30
    with pytest.raises(UserError, match="another `hetermoe train` is at work"), claimed(tmp_path, 60.0, before):
        pass  # it has ended since, which is no reason either
    with claimed(tmp_path, 60.0, trace(tmp_path)):
        pass


def test_where_the_nodes_are_is_kept_for_the_next_start(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    meet(*[lambda found: agreed_run(found, lambda: run)] * len(run.plan.inputs.nodes))
    assert find_succession(tmp_path, [0, 1], None) is None
    found = find_succession(tmp_path, [1, 7], 5.0)
    assert found == Succession(str(tmp_path), {0: "127.0.0.1"}, 5.0)
    assert find_succession(tmp_path / "new", [0, 1], 5.0) == Succession(str(tmp_path / "new"), {}, 5.0)
