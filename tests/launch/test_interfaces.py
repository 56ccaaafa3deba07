"""The way to node 0: its address, and the network interface that reaches it."""

import socket

import pytest

from hetermoe_cli.errors import UserError
from hetermoe_cli.launch.interfaces import resolve, socket_environment
from hetermoe_cli.launch.place import Place


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def test_the_interface_that_reaches_node_0(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Place(1, 2, "127.0.0.1", 1)
    assert socket_environment(there) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert socket_environment(Place()) == {"GLOO_SOCKET_IFNAME": "lo"}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")
    assert socket_environment(there) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert socket_environment(there) == {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "ib"}


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("127.0.0.1") == "127.0.0.1"
    assert resolve("localhost").startswith("127.")
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answer)
    with pytest.raises(
        UserError, match=r"--master-addr own-name: is 127\.0\.1\.1 on this machine, which no other reaches"
    ):
        resolve("own-name")

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="--master-addr nowhere: no IPv4 address found"):
        resolve("nowhere")
