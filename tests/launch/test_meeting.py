"""Launchers of two nodes that meet: what one of them meets with, the other reports."""

import gc
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch import meeting
from hetermoe_cli.launch.ends import GONE, OtherPlan, PeerFailure
from hetermoe_cli.launch.meeting import Meeting
from hetermoe_cli.launch.place import Place

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
            with Meeting(Place(node, len(parts), "127.0.0.1", port), "plan") as found:
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


def test_who_ends_while_another_looks_round_has_still_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Node 1 looks for an end from before node 0 has come until node 0 is at its end."""
    gather, ended, looking = Meeting.gather, Meeting._ended, threading.Event()

    def slow_ended(self: Meeting) -> object:
        looking.set()
        while self.place.node == 1 and not self._keys.check(["done"]):
            time.sleep(0.01)
        return ended(self)

    def late_gather(self: Meeting, key: str) -> str:
        return gather(self, key) if self.place.node == 1 or looking.wait(60) else "never looked"

    monkeypatch.setattr(Meeting, "_ended", slow_ended)
    monkeypatch.setattr(Meeting, "gather", late_gather)
    assert meet(lambda found: "finished", lambda found: "came") == ["finished", "came"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_check_that_fails_ends_all(failing: int) -> None:
    parts: list[Part] = [lambda found: found.gather("checked")] * 3
    parts[failing] = refuse()
    results = meet(*parts)
    assert results.pop(failing) == (ExitCode.BAD_INPUT, "no such text")
    assert results == [(ExitCode.BAD_INPUT, f"node {failing}: no such text")] * 2


def test_workers_are_ended_when_those_of_another_node_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "FAILURE_SECONDS", 0.5)
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


@pytest.mark.parametrize("slow", [0, 1])
def test_a_node_that_works_is_waited_for_as_long_as_it_beats(slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node 0 may read through a large checkpoint while the others have nothing left to check."""
    monkeypatch.setattr(meeting, "_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(meeting, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(meeting, "_SILENCE_SECONDS", 2.0)

    def part(found: Meeting) -> str:
        if found.place.node == slow:
            time.sleep(3)
        return found.gather("checked", f"of {found.place.node}")

    monkeypatch.setattr(Meeting, "gather", patient_first(Meeting.gather))
    assert meet(part, part, part) == ["of 0"] * 3


def patient_first(gather: Callable[[Meeting, str, str], str]) -> Callable[..., str]:
    """`gather` that waits for all to be started at its first key, `here`, before it may lose its patience."""

    def patient(self: Meeting, key: str, value: str = "-") -> str:
        deadline = time.monotonic() + 60
        while key == "here" and len(self._came()) < self.place.nodes - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        return gather(self, key, value)

    return patient


def test_a_node_that_is_not_started_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(meeting, "_LATE_SECONDS", 0.0)
    with (
        pytest.raises(UserError, match=r"no word from node 1, 2 in 0 s: run the same command there"),
        Meeting(Place(0, 3, "127.0.0.1", free_port())) as found,
    ):
        found.gather("checked")


def test_a_node_number_is_given_once() -> None:
    def again(found: Meeting) -> None:
        expected = "node 0 cannot listen at .* another --master-port" if found.place.node == 0 else "started twice"
        with pytest.raises(UserError, match=expected):
            Meeting(found.place).__enter__()

    assert meet(again, again) == [None, None]


def test_all_that_came_hear_who_did_not() -> None:
    port = free_port()

    def launcher(node: int) -> list[int]:
        with Meeting(Place(node, 4, "127.0.0.1", port)) as found:
            return found.absent(None if node else 1.5)  # node 0 decides for all

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(launcher, [0, 2])) == [[1, 3]] * 2


def test_nobody_waits_for_a_decision_that_node_0_does_not_take() -> None:
    assert meet(lambda found: found.absent(None), lambda found: found.absent(5.0)) == [[], []]


def test_who_comes_while_a_plan_without_it_is_made_hears_of_it_and_disturbs_nobody() -> None:
    port, late = free_port(), threading.Event()

    def launcher(node: int) -> object:
        assert node < 2 or late.wait(60)
        with Meeting(Place(node, 3, "127.0.0.1", port)) as found:
            lost = found.absent(1.0)
            late.set()
            return lost, found.word("plan", lambda: "short" if time.sleep(3) is None else "")

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(launcher, [0, 1, 2])) == [([2], "short")] * 3


def test_a_word_that_cannot_be_said_ends_all() -> None:
    def speechless() -> str:
        raise UserError("no words", ExitCode.DOES_NOT_FIT)

    parts: list[Part] = [lambda found: found.word("plan", speechless)] * 2
    assert meet(*parts) == [(4, "no words"), (4, "node 0: no words")]


def test_a_launcher_of_another_plan_does_not_disturb_the_run() -> None:
    def stranger(found: Meeting) -> None:
        if found.place.node:
            other = Place(1, 3, found.place.host, found.place.port)
            with pytest.raises(OtherPlan, match="has 2 nodes, not 3") as caught:
                Meeting(other).__enter__()
            assert (caught.value.plan, caught.value.host) == ("plan", "127.0.0.1")

    assert meet(stranger, stranger) == [None, None]


def test_a_plan_with_as_many_other_nodes_is_another_one() -> None:
    port = free_port()
    with Meeting(Place(0, 2, "127.0.0.1", port, used=(1, 2)), "plan"):
        stranger = Place(0, 2, "127.0.0.1", port, leader=1, used=(0, 1))
        store = TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(meeting, "open_store", lambda place, _: (place, store))
            with pytest.raises(OtherPlan, match="has nodes 1, 2 of the cluster file, not 0, 1") as caught:
                Meeting(stranger).__enter__()
        assert (caught.value.plan, caught.value.host) == ("plan", "127.0.0.1")


@pytest.mark.parametrize("closes", [True, False])
def test_a_launcher_that_returns_waits_for_the_next_meeting(closes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_LEAVE_SECONDS", 60.0 if closes else 0.3)
    place = Place(1, 2, "127.0.0.1", free_port())
    first: list[Meeting] = [Meeting(Place(0, 2, place.host, place.port))]
    first[0]._check_in()
    Meeting(place)._check_in()  # it dies without a word
    if closes:
        threading.Timer(0.5, lambda: (first.clear(), gc.collect())).start()  # type: ignore[func-returns-value]
    with pytest.raises(UserError) as caught:
        Meeting(place, returns=True)._check_in()
    assert (caught.value.code is ExitCode.WORKER_DIED) == closes
    assert (GONE if closes else "started twice") in str(caught.value)
