"""`hetermoe link`: two launchers on one machine, as if on two, and refusals that write nothing."""

import json
import socket
import subprocess
import time
from pathlib import Path

import pytest

from hetermoe_cli.spec.cluster import LinkRecord
from hetermoe_cli.spec.files import load
from train_command import HETERMOE


def link(output: Path, node: int | None, port: int, *options: object) -> subprocess.Popen[str]:
    where = [] if node is None else ["--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port]
    command = [*HETERMOE, "link", "lab-net", "--device", "cpu", "--quick", "--output", output, *where, *options]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_nodes_measure_what_is_between_them(tmp_path: Path, port: int) -> None:
    """Two workers a node: their messages share a NIC. Wide bounds: the machine may be busy."""
    nodes = [link(tmp_path / str(node), node, port, "--nproc-per-node", 2, "--json") for node in (1, 0)][::-1]
    (out, errors), (other_out, other_errors) = (node.communicate(timeout=120) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], errors + other_errors
    record = load(LinkRecord, tmp_path / "0/links/lab-net.yaml")
    assert json.loads(out) == record.model_dump(mode="json")
    assert (record.name, record.source, other_out, (tmp_path / "1").exists()) == ("lab-net", "measured", "", False)
    assert "between two nodes, gloo, 2 workers and 1 NICs each" in record.comment
    assert 0.01 < record.link.bandwidth_gigabytes_per_second < 100
    assert 0 < record.link.latency_microseconds < 50_000
    assert record.link.all_reduce_gigabytes_per_second is not None
    assert "node 1 of 2: done" in other_errors


def test_nodes_that_would_measure_different_things_both_say_so(tmp_path: Path, port: int) -> None:
    nodes = [link(tmp_path, 0, port, "--nproc-per-node", 2), link(tmp_path, 1, port)]
    errors = [node.communicate(timeout=120)[1].strip().splitlines()[-1] for node in nodes]
    assert [node.returncode for node in nodes] == [3, 3]
    assert errors[1].startswith("hetermoe: error: --nproc-per-node (or the number of CUDA devices), --nics, --device ")
    assert errors[0].startswith("hetermoe: error: node 1: --nproc-per-node ")
    assert not list(tmp_path.iterdir())


def test_a_node_that_cannot_measure_tells_the_other(tmp_path: Path, port: int) -> None:
    nodes = [link(tmp_path, 0, port), link(tmp_path, 1, port, "--nics", 2)]
    errors = [node.communicate(timeout=120)[1].strip().splitlines()[-1] for node in nodes]
    assert [node.returncode for node in nodes] == [3, 3]
    told = "--nics 2: only 1 of a node's devices send, over as many NICs at most"
    assert errors == [f"hetermoe: error: node 1: {told}", f"hetermoe: error: {told}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "the link has 2 nodes: run on each of them, K being 0 on one and 1 on the other and HOST the address of"),
        (("--node-rank", 2, "--master-addr", "127.0.0.1"), "--node-rank is 2: the link has 2 nodes, 0 to 1: start it"),
    ],
)
def test_a_node_without_a_place_is_told_what_to_run(tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    node = link(tmp_path, None, 0, *options)
    _, errors = node.communicate(timeout=60)
    assert (node.returncode, message in errors) == (2, True), errors


@pytest.mark.long
def test_a_node_that_is_gone_ends_the_other(tmp_path: Path, port: int) -> None:
    nodes = [link(tmp_path, node, port) for node in (0, 1)]
    deadline = time.monotonic() + 60
    while not (workers := measuring(nodes[1])):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    nodes[1].kill()
    _, errors = nodes[0].communicate(timeout=60)
    assert nodes[0].returncode == 6
    assert errors.strip().splitlines()[-1] == "hetermoe: error: node 1: its launcher or its machine is gone"
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert not list(tmp_path.iterdir())


def measuring(node: subprocess.Popen[str]) -> list[str]:
    """The processes that a launcher has started."""
    return subprocess.run(["pgrep", "-P", str(node.pid)], capture_output=True, text=True).stdout.split()
