"""Who holds the store where node 0 does not come: the first node that has waited long enough for all before it.

Nodes know each other's addresses from an earlier start of the run (hosts.yaml). Node k takes the place once it has
waited k times `--replan-after`; nodes that come later, node 0 too, find it at its address.
"""

import socket
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hetermoe_cli.spec.files import dump, load
from hetermoe_cli.spec.hosts import Hosts

HOSTS_FILE = "hosts.yaml"
_CONNECT_SECONDS = 1.0
_AT_ONCE = 32  # addresses that are asked at the same time


@dataclass(frozen=True)
class Succession:
    """What a node needs to know to follow another one than node 0, or to take its place.

    `run`: the run's folder, by which a store tells whose it is; `hosts`: addresses at the newest start by node, counted
    anew; `seconds`: that a node waits for each one before it.
    """

    run: str
    hosts: Mapping[int, str]
    seconds: float

    def turn(self, node: int) -> float | None:
        """After how many seconds a node takes the place; None where the others would not find it."""
        return node * self.seconds if node in self.hosts else None

    def may_lead(self, node: int, waited: float) -> bool:
        """Whether it is this node's turn."""
        turn = self.turn(node)
        return turn is not None and waited >= turn

    def answering(self, nodes: Iterable[int], port: int) -> list[tuple[int, str]]:
        """Those of `nodes`, with their addresses, at which something listens; in their order."""
        asked = [(node, self.hosts[node]) for node in sorted(nodes) if node in self.hosts]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            listening = list(pool.map(lambda pair: _listens(pair[1], port), asked))
        return [pair for pair, found in zip(asked, listening, strict=True) if found]


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), _CONNECT_SECONDS):
            return True
    except OSError:
        return False


def find_succession(folder: Path, numbers: Sequence[int], seconds: float | None) -> Succession | None:
    """For nodes with these numbers in the cluster file; None where the run does not go on without one (None)."""
    if seconds is None:
        return None
    path = folder / HOSTS_FILE
    known = load(Hosts, path).addresses if path.exists() else {}
    hosts = {node: known[number] for node, number in enumerate(numbers) if number in known}
    return Succession(str(folder.resolve()), hosts, seconds)


def write_hosts(folder: Path, numbers: Sequence[int], addresses: Mapping[int, str]) -> None:
    """For the next start. `addresses`: by node, counted anew; `numbers`: of these in the cluster file."""
    found = {numbers[node]: address for node, address in sorted(addresses.items())}
    dump(Hosts(addresses=found), folder / HOSTS_FILE, "Where the nodes of the newest start are, for the next one.")
