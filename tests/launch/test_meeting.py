"""Launchers of two nodes that meet: what one of them meets with, the other reports."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builders import make_plan
from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch import agreement, meeting
from hetermoe_cli.launch.agreement import agreed_run
from hetermoe_cli.launch.ends import GONE, PeerFailure
from hetermoe_cli.launch.meeting import Meeting
from hetermoe_cli.launch.place import Place
from hetermoe_cli.spec.run import RunSpec

Part = Callable[[Meeting], object]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def meet(*parts: Part) -> list[object]:
    """Every node's part in a launcher of its own: what it returns, or the error that it reports."""
    port = free_port()

    def launcher(node: int) -> object:
        try:
            with Meeting(Place(node, len(parts), "127.0.0.1", port)) as found:
                found.gather("here")  # a node that is still to come would wait for one that has ended
                return parts[node](found)
        except UserError as error:
            return error.code, str(error)
        return "ended with node 0"

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(launcher, range(len(parts))))


def refuse(code: ExitCode = ExitCode.BAD_INPUT, kind: type[UserError] = UserError) -> Part:
    def part(found: Meeting) -> None:
        raise kind("no such text", code)

    return part


def watch(found: Meeting) -> None:
    while True:
        found.watch()


def test_nodes_gather_and_have_node_0s_word() -> None:
    assert meet(*[lambda found: found.gather("word", f"of {found.place.node}")] * 3) == ["of 0"] * 3


@pytest.mark.parametrize("failing", [0, 1])
def test_a_check_that_fails_ends_all(failing: int) -> None:
    parts: list[Part] = [lambda found: found.gather("checked")] * 3
    parts[failing] = refuse()
    results = meet(*parts)
    assert results.pop(failing) == (ExitCode.BAD_INPUT, "no such text")
    assert results == [(ExitCode.BAD_INPUT, f"node {failing}: no such text")] * 2


def test_workers_are_ended_when_those_of_another_node_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_FAILURE_SECONDS", 0.5)
    results = meet(watch, refuse(ExitCode.WORKER_DIED), refuse(ExitCode.WORKER_DIED, PeerFailure))
    assert results == [(6, "node 1: no such text"), (6, "no such text"), (6, "node 1: no such text")]


def test_of_an_interrupt_node_0_tells_where_it_was_saved() -> None:
    results = meet(refuse(ExitCode.INTERRUPTED), lambda found: "workers ended well", refuse(ExitCode.INTERRUPTED))
    assert results == [(130, "no such text")] * 3
    assert meet(lambda found: "finished", refuse(ExitCode.INTERRUPTED)) == ["finished", "ended with node 0"]


def test_a_node_that_falls_silent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SILENCE_SECONDS", "_SHORT_SILENCE_SECONDS"):
        monkeypatch.setattr(meeting, name, 0.5)
    monkeypatch.setattr(Meeting, "_beat", lambda self: None)

    def part(found: Meeting) -> None:
        found.gather("checked")
        if found.place.node == 0:
            watch(found)

    monkeypatch.setattr(meeting, "_VERDICT_SECONDS", 0.0)  # node 1 leaves at once
    assert meet(part, part)[0] == (6, f"node 1: {GONE}")


def test_a_node_number_is_given_once() -> None:
    def again(found: Meeting) -> None:
        expected = "node 0 cannot listen at .* another --master-port" if found.place.node == 0 else "started twice"
        with pytest.raises(UserError, match=expected):
            Meeting(found.place).__enter__()

    assert meet(again, again) == [None, None]


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
