"""Place: which node of a plan this launcher starts, and where node 0 is found."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.launch.arguments import without

DEFAULT_PORT = 29500  # torchrun's
LOOPBACK = "127.0.0.1"
_OPTIONS = {"--node-rank": 1, "--master-addr": 1, "--master-port": 1, "--dry-run": 0, "--json": 0}  # with their values
_SCONTROL_SECONDS = 20


@dataclass(frozen=True)
class Place:
    """Node `node` of the `nodes` that have workers, counted anew.

    The `leader`, node 0 unless it did not come, listens at `host`:`port` (0: any free port, where there is no other
    node). `used`: the nodes' numbers in the cluster file, where that is known."""

    node: int = 0
    nodes: int = 1
    host: str = LOOPBACK
    port: int = 0
    leader: int = 0
    used: tuple[int, ...] = field(default=(), compare=False)

    @property
    def leads(self) -> bool:
        """Whether this node holds the store, decides, writes what all read, and shows the progress."""
        return self.node == self.leader

    @property
    def led(self) -> list[int]:
        """All nodes but the leader."""
        return [node for node in range(self.nodes) if node != self.leader]


@dataclass(frozen=True)
class PlaceOptions:
    """Options of the command, named as torchrun's. None: from the environment."""

    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None


class Subject(NamedTuple):
    """What has nodes, in words for errors."""

    name: str
    number: str  # of a node
    hint: str = ""


PLAN = Subject(
    "the plan",
    "its number in the cluster file",
    " (--dry-run lists the nodes; --emulate takes this machine only)",
)
LINK = Subject("the link", "0 on one and 1 on the other")


def find_place(
    nodes: int,
    options: PlaceOptions,
    environment: Mapping[str, str],
    arguments: Sequence[str],
    used: Sequence[int] | None = None,
    subject: Subject = PLAN,
) -> Place | None:
    """Options first, then MASTER_ADDR and MASTER_PORT, then what Slurm says; None where this node has no workers.

    `nodes`: those in the cluster file, by whose numbers they are named; `used`: which of them have workers, by default
    all. UserError (usage) names what is missing, and what to run; `arguments`: those of this command.
    """
    used = range(nodes) if used is None else used
    node, source = _node(options, environment)
    if node is not None and not 0 <= node < nodes and (nodes > 1 or options.node_rank is not None):
        numbers = "one node, 0" if nodes == 1 else f"{nodes} nodes, 0 to {nodes - 1}"
        raise UserError(f"{source} is {node}: {subject.name} has {numbers}: start it there only", ExitCode.USAGE)
    if nodes > 1 and node is not None and node not in used:
        return None
    if len(used) == 1:
        return Place()
    host = options.master_addr or environment.get("MASTER_ADDR") or _slurm_host(environment, used[0])
    if node is None or host is None:
        run = command_of_node(arguments, "K", host or "HOST", options.master_port)
        raise UserError(
            f"{subject.name} has {len(used)} nodes: run on each of them, K being {subject.number} and HOST the "
            f"address of node {used[0]}: {run}{subject.hint}",
            ExitCode.USAGE,
        )
    port = options.master_port or _port(environment)
    return Place(used.index(node), len(used), host, port, used=tuple(used))


def announce(place: Place, name: str, more: str = "") -> None:
    """Say where a launcher of several looks for the others; and let torch's store not warn where hosts have no
    names."""
    doing = "listens" if place.node == 0 else "looks for node 0"
    print(f"{name}: {doing} at {place.host}:{place.port}{more}", file=sys.stderr, flush=True)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def command_of_node(arguments: Sequence[str], node: int | str, host: str, port: int | None) -> str:
    """The shell command that starts `node`: this one's `arguments`, with these options instead of its own."""
    place = ["--node-rank", str(node), "--master-addr", host, *(["--master-port", str(port)] if port else [])]
    return shlex.join(["hetermoe", *without(arguments, _OPTIONS), *place])


def _node(options: PlaceOptions, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """The node's number, and what says so. Slurm counts nodes as their list has them, whose first one is node 0."""
    if options.node_rank is not None:
        return options.node_rank, "--node-rank"
    for name in ("SLURM_NODEID", "SLURM_PROCID"):
        if environment.get(name, "").isdigit():
            return int(environment[name]), name
    return None, ""


def _port(environment: Mapping[str, str]) -> int:
    text = environment.get("MASTER_PORT", str(DEFAULT_PORT))
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise UserError(f"MASTER_PORT is {text!r}: set a port from 1 to 65535, or pass --master-port", ExitCode.USAGE)
    return int(text)


def _slurm_host(environment: Mapping[str, str], node: int) -> str | None:
    """The host of `node`, as Slurm's own tool reads the list; None without Slurm."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not hosts:
        return None
    command = ["scontrol", "show", "hostnames", hosts]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(shown.stdout.split()[node:]), None)
