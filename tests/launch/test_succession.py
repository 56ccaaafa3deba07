"""Who holds the store where node 0 does not come, and who finds it."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from test_meeting import free_port
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch import rendezvous
from hetermoe_cli.launch.meeting import Meeting
from hetermoe_cli.launch.place import Place
from hetermoe_cli.launch.succession import Succession

HOSTS = {node: f"127.0.0.{node + 1}" for node in range(4)}  # of a machine, all its own
SECONDS = 0.6


def launchers(starts: dict[int, float], part: Callable[[Meeting], object], run: str = "run") -> dict[int, object]:
    """Nodes of four that start after so many seconds: what each has of its part, or the error that it reports."""
    port = free_port()

    def launcher(node: int) -> object:
        time.sleep(starts[node])
        try:
            succession = Succession(run, HOSTS, SECONDS)
            with Meeting(Place(node, 4, HOSTS[0], port), "plan", succession=succession) as found:
                return part(found)
        except UserError as error:
            return error.code, str(error)

    with ThreadPoolExecutor(len(starts)) as pool:
        return dict(zip(starts, pool.map(launcher, starts), strict=True))


def leader(found: Meeting) -> tuple[int, str, list[int]]:
    return found.place.leader, found.place.host, found.absent(3.0)


def test_the_first_node_that_is_there_takes_node_0s_place() -> None:
    assert launchers({1: 0.0, 2: 0.0, 3: 0.0}, leader) == dict.fromkeys((1, 2, 3), (1, HOSTS[1], [0]))
    assert launchers({2: 0.0, 3: 0.0}, leader) == dict.fromkeys((2, 3), (2, HOSTS[2], [0, 1]))


def test_node_0_that_comes_late_follows() -> None:
    everyone = launchers(
        {0: 2.0, 1: 0.0, 2: 0.0, 3: 0.0}, lambda found: (leader(found), found.gather("word", "by all"))
    )
    assert everyone == dict.fromkeys(range(4), ((1, HOSTS[1], []), "by all"))


def test_node_0_that_comes_leads() -> None:
    assert launchers({0: 0.3, 1: 0.0, 2: 0.0, 3: 0.0}, leader) == dict.fromkeys(range(4), (0, HOSTS[0], []))


def test_all_know_where_the_others_are() -> None:
    def part(found: Meeting) -> object:
        found.absent(3.0)
        return found.word("where", lambda: str(found.addresses()))

    told = launchers({1: 0.0, 3: 0.0}, part)
    assert told == dict.fromkeys((1, 3), str({1: HOSTS[1], 3: "127.0.0.1"}))  # as the system reaches its own address


@pytest.mark.parametrize("run", ["run", "another run"])
def test_another_runs_store_is_left_alone(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_PATIENCE_SECONDS", 0.0)
    port = free_port()
    with Meeting(Place(0, 1, HOSTS[1], port), succession=Succession("run", {}, 0.0)):
        place, found = Place(2, 4, HOSTS[0], port), Succession(run, {1: HOSTS[1]}, 0.0)
        if run == "run":
            assert rendezvous.open_store(place, found)[0].host == HOSTS[1]
            return
        with pytest.raises(UserError, match="no answer from node 0") as caught:
            rendezvous.open_store(place, found)
    assert caught.value.code is ExitCode.WORKER_DIED


def opened(node: int, hosts: dict[int, str], host: str, port: int) -> tuple[Place, TCPStore]:
    """As a node finds itself that takes node 0's place at once."""
    return rendezvous.open_store(Place(node, 4, host, port), Succession("run", hosts, 0.0))


def alone(node: int, hosts: dict[int, str], host: str, port: int) -> Place:
    return opened(node, hosts, host, port)[0]


def test_of_two_that_did_not_see_each_other_the_first_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    port, both_have_looked, listen = free_port(), Barrier(2, timeout=30), rendezvous._listen

    def after_the_other_has_looked(place: Place, address: str) -> socket.socket:
        both_have_looked.wait()
        return listen(place, address)

    monkeypatch.setattr(rendezvous, "_listen", after_the_other_has_looked)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda node: opened(node, HOSTS, HOSTS[0], port), (1, 2)))
    assert [place.leader for place, _ in found] == [1, 1]


def test_launchers_of_one_machine_may_share_an_address() -> None:
    port, shared = free_port(), dict.fromkeys(range(4), HOSTS[0])
    kept = opened(2, shared, HOSTS[0], port)
    assert kept[0].leader == 2
    assert opened(3, shared, HOSTS[0], port)[1].check(["of_run"])


def test_a_name_that_went_with_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert alone(1, HOSTS, "gone.invalid", free_port()).host == HOSTS[1]
    with pytest.raises(UserError, match=r"--master-addr gone\.invalid: no IPv4 address found"):
        alone(1, {}, "gone.invalid", free_port())


def test_a_node_that_has_moved_waits_for_node_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_PATIENCE_SECONDS", 1.0)
    with pytest.raises(UserError, match="node 1: no answer from node 0") as caught:
        alone(1, {1: "192.0.2.7"}, HOSTS[0], free_port())
    assert caught.value.code is ExitCode.WORKER_DIED


def test_what_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_CONNECT_SECONDS", 0.5)
    port = free_port()
    with socket.create_server((HOSTS[2], port)):
        began = time.monotonic()
        assert alone(0, HOSTS, HOSTS[0], port).leads
        assert time.monotonic() - began < 10


def test_node_0_may_be_told_the_address_of_another() -> None:
    """A node that was turned away while another led: it is node 0 of the plan that it was given."""
    assert alone(0, HOSTS, "192.0.2.7", free_port()).host == HOSTS[0]
    with pytest.raises(UserError, match=r"node 0 cannot listen at 192\.0\.2\.7"):
        alone(0, {0: "192.0.2.8"}, "192.0.2.7", free_port())
